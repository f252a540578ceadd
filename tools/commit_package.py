"""A commit's own package, ready to run: a worktree of it, with its native code built in place.

Whatever is installed in the running environment, commands run with the worktree's package; this is
checked before the first one. Native code is kept by its sources, and built once for all commits
that share them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TAIL_LINES = 25
CHECK_SECONDS, BUILD_SECONDS = 120.0, 1800.0  # after which something hangs
NATIVE_SOURCES = ("setup.py", "pyproject.toml", "*.cpp", "*.cc", "*.h", "*.cu", "*.cuh")


class CompareError(Exception):
    """What keeps the comparison from being made, in a line or with the end of a log."""


class Source:
    """A commit's own package, ready to run: its worktree, made on first use, with native code."""

    def __init__(self, repository: Path, commit: str, work: Path, native: Path) -> None:
        self.commit = commit
        self._repository, self._work, self._native = repository, work, native
        self._folder = work / "worktrees" / commit
        self._is_ready = False
        self._server: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[object], log: Path, seconds: float) -> None:
        """`python ARGUMENTS` with this commit's package; CompareError with its last words."""
        self._prepare()
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    [sys.executable, *map(str, arguments)],
                    cwd=self._folder,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"nothing within {seconds:g} s"
        if code != 0:
            raise CompareError(self._last_words(log, code))

    def _last_words(self, log: Path, code: object) -> str:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return f"{log}: expected {self.commit[:10]} to exit 0, got {code}:\n{tail}"

    def torchrun(self, module: str, config: Path, log: Path, seconds: float) -> None:
        """`module` with the settings of `config` on two ranks."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.run([*launcher, "-m", f"megatron_rl.{module}", config], log, seconds)

    def run_ranks(self, module: str, config: Path, log: Path, seconds: float) -> None:
        """As `torchrun`, but on ranks that are forked with the libraries' imports behind them."""
        self._prepare()
        if self._server is None:
            with (self._work / "warm_ranks.log").open("w") as errors:
                self._server = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("warm_ranks.py"))],
                    cwd=self._folder,
                    env=self._environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        job = {
            "module": f"megatron_rl.{module}",
            "arguments": [str(config)],
            "log": str(log),
            "num_ranks": 2,
            "seconds": seconds,
        }
        try:
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise CompareError(self._last_words(self._work / "warm_ranks.log", "no answer"))
        codes = json.loads(answer)
        if any(codes):
            raise CompareError(self._last_words(log, codes))

    def close(self) -> None:
        """End the ranks' server, and take the worktree away."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()
        self._remove()

    def _remove(self) -> None:
        """Also what a killed comparison left."""
        if self._folder.exists():
            git(self._repository, "worktree", "remove", "--force", "--force", str(self._folder))
        git(self._repository, "worktree", "prune")

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(self._folder),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def _prepare(self) -> None:
        if self._is_ready:
            return
        self._is_ready = True
        self._remove()
        git(self._repository, "worktree", "add", "--detach", str(self._folder), self.commit)
        built = self._native / self._native_key()
        if not built.is_dir():
            # egg_info: the engine finds this commit's plug-in by the entry points beside it
            steps = ["egg_info", "build_ext", "--inplace"]
            self.run(["setup.py", "-q", *steps], self._work / "build.log", BUILD_SECONDS)
            partial = built.with_name(f"{built.name}.partial.{os.getpid()}")
            for path in [*self._folder.rglob("*.so"), *self._folder.glob("*.egg-info/*")]:
                target = partial / path.relative_to(self._folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
            if built.is_dir():  # another comparison's, with the same folder of native code
                shutil.rmtree(partial)
            else:
                partial.rename(built)
        shutil.copytree(built, self._folder, dirs_exist_ok=True)
        self._check_package()

    def _native_key(self) -> str:
        """Of the native sources, where they lie, what describes the package, and torch."""
        listed = git(self._repository, "ls-tree", "-r", self.commit)
        kept = [
            line
            for line in listed.splitlines()
            if any(Path(line.split("\t")[1]).match(each) for each in NATIVE_SOURCES)
        ]
        return digest([kept, torch.__version__, sys.version])

    def _check_package(self) -> None:
        """The editable install of another checkout has a finder of its own, which must lose."""
        log = self._work / "package.log"
        # -P: without the current folder, which is the worktree and would hide what else is found
        code = "import megatron_rl; print(megatron_rl.__file__)"
        self.run(["-P", "-c", code], log, CHECK_SECONDS)
        found = Path(log.read_text().strip())
        if not found.is_relative_to(self._folder):
            raise CompareError(
                f"{self.commit[:10]}: expected the package of {self._folder}, got {found}"
            )
        print(f"{self.commit[:10]} runs {found}", flush=True)


def git(repository: Path, *arguments: str) -> str:
    """What git printed; CompareError with what it complained of."""
    command = ["git", "-C", str(repository), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise CompareError(f"{' '.join(command)}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def digest(value: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
