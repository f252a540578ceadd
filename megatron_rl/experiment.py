"""Settings in, a finished training run out: for tools that compare runs with each other.

Each run is a torchrun of its own, as `launch/torchrun.sh` starts it, with its output in
`<run_dir>/console.log`. A run that is finished is not run again; one that was stopped goes on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.file import load_config
from megatron_rl.entry import ERROR_FILE
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.lifetime import die_with_parent, register_cleanup, unregister_cleanup

DONE_FILE = "done.json"  # the settings of a finished run
TAIL_LINES = 15


def run_to_the_end(config: str | Path, overrides: Sequence[str], run_dir: Path) -> Path:
    """Train with `config` and `overrides` in `run_dir`, on one replica of its model.

    Returns:
        `run_dir`.
    Raises:
        ConfigError: settings that do not load, or a finished run of other settings in `run_dir`.
        EngineError: the run failed; tells its last words.
    """
    settings = load_config(config, [*overrides, f"run_dir={run_dir}"])
    wanted = {"config": str(config), "overrides": list(overrides)}
    done = run_dir / DONE_FILE
    if done.is_file():
        if json.loads(done.read_text()) != wanted:
            raise ConfigError(
                f"{done}: expected a run of {wanted}, got {done.read_text().strip()}; choose "
                "another output folder, or delete this one"
            )
        return run_dir
    num_ranks = settings.parallel.tensor * settings.parallel.pipeline
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_ranks), "-m", "megatron_rl.train", str(config)]
    command += [*overrides, f"run_dir={run_dir}"]
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "console.log").open("ab") as log:
        code = _wait(command, log)
    if code != 0:
        raise EngineError(f"{run_dir}: expected the run to end well, got {_last_words(run_dir)}")
    done.write_text(json.dumps(wanted) + "\n")
    return run_dir


def _wait(command: list[str], log: object) -> int:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # torchrun then ends its ranks
    )
    register_cleanup(process.terminate)
    try:
        return process.wait()
    finally:
        unregister_cleanup(process.terminate)
        if process.poll() is None:
            process.terminate()
            process.wait()


def _last_words(run_dir: Path) -> str:
    error = run_dir / ERROR_FILE
    if error.is_file():
        return error.read_text().strip()
    return "\n".join((run_dir / "console.log").read_text().splitlines()[-TAIL_LINES:])
