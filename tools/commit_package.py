"""Prepares the package of a commit: a worktree of the commit, with its native code built in place.

Commands run with the worktree's package, independently of the packages installed in the running
environment; this is checked before the first command. Built native code is stored by its sources,
so that commits with the same sources share one build.
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
CHECK_SECONDS, BUILD_SECONDS = 120.0, 1800.0  # time limits; a longer process is considered hung
NATIVE_SOURCES = ("setup.py", "pyproject.toml", "*.cpp", "*.cc", "*.h", "*.cu", "*.cuh")


class CompareError(Exception):
    """The comparison cannot be made; the message is the reason, possibly with the end of a log."""


class Source:
    """The package of a commit, ready to run: a worktree, created on first use, and native code."""

    def __init__(self, repository: Path, commit: str, work: Path, native: Path) -> None:
        self.commit = commit
        self._repository, self._work, self._native = repository, work, native
        self._folder = work / "worktrees" / commit
        self._is_ready = False
        self._server: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[object], log: Path, seconds: float) -> None:
        """Run `python ARGUMENTS` with this commit's package. If it fails, raises CompareError with
        the end of its output.
        """
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
        """Run `module` with the settings of `config` on two ranks."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.run([*launcher, "-m", f"megatron_rl.{module}", config], log, seconds)

    def run_ranks(self, module: str, config: Path, log: Path, seconds: float) -> None:
        """Like `torchrun`, but the ranks are forked from a process that has already imported the
        libraries.
        """
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
        """End the process that forks the ranks, and remove the worktree."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()
        self._remove()

    def _remove(self) -> None:
        """Remove the worktree, also one that a killed comparison left."""
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
            # egg_info: the engine finds this commit's plug-in through the entry points in it
            steps = ["egg_info", "build_ext", "--inplace"]
            self.run(["setup.py", "-q", *steps], self._work / "build.log", BUILD_SECONDS)
            partial = built.with_name(f"{built.name}.partial.{os.getpid()}")
            for path in [*self._folder.rglob("*.so"), *self._folder.glob("*.egg-info/*")]:
                target = partial / path.relative_to(self._folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
            if built.is_dir():  # built by another comparison that shares the folder of native code
                shutil.rmtree(partial)
            else:
                partial.rename(built)
        shutil.copytree(built, self._folder, dirs_exist_ok=True)
        self._check_package()

    def _native_key(self) -> str:
        """A key computed from the native sources with their paths, the package's description, and
        the versions of torch and Python.
        """
        listed = git(self._repository, "ls-tree", "-r", self.commit)
        kept = [
            line
            for line in listed.splitlines()
            if any(Path(line.split("\t")[1]).match(each) for each in NATIVE_SOURCES)
        ]
        return digest([kept, torch.__version__, sys.version])

    def _check_package(self) -> None:
        """Check that this commit's package is imported, because the import finder of another
        checkout's editable install could take precedence.
        """
        log = self._work / "package.log"
        # -P leaves out the current folder, which is the worktree and would hide other packages
        code = "import megatron_rl; print(megatron_rl.__file__)"
        self.run(["-P", "-c", code], log, CHECK_SECONDS)
        found = Path(log.read_text().strip())
        if not found.is_relative_to(self._folder):
            raise CompareError(
                f"{self.commit[:10]}: expected the package of {self._folder}, got {found}"
            )
        print(f"{self.commit[:10]} runs {found}", flush=True)


def git(repository: Path, *arguments: str) -> str:
    """The output of a git command. If it fails, raises CompareError with git's error message."""
    command = ["git", "-C", str(repository), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise CompareError(f"{' '.join(command)}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def digest(value: Any) -> str:
    """A short hash of plain values, used as a name."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
