"""`python -m megatron_rl.serve CONFIG [key=value ...]`: starts one rollout engine for a run that
does not start its own. CONFIG is the config of that run.

The engine is the same that a run would start (engine/server.py). It listens on `rollout.port` and
runs until Ctrl-C. To use it, start the run with `rollout.num_engines=0
rollout.urls=[http://127.0.0.1:PORT]` and the token in MEGATRON_RL_TOKEN. Weights are sent through
the shared memory of one host, so the engine listens on loopback only.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.engine.start import start_engines_of
from megatron_rl.errors import ConfigError
from megatron_rl.process.command import Progress, run_command
from megatron_rl.process.lifetime import register_cleanup
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import read_geometry

TOKEN_FILE = "engine_token"
CHECK_SECONDS = 0.5  # between checks of the engine's process


def serve(config: Config, progress: Progress) -> None:
    """Start the engine and watch it. Never returns: it raises, or a signal ends the process."""
    if config.rollout.port == 0:
        raise ConfigError(
            "rollout.port: expected the port that rollout.urls of the run will name, got 0"
        )
    check_checkpoint(config.model.path, read_geometry(config.model.path))
    [engine] = start_engines_of(
        replace(config, rollout=replace(config.rollout, num_engines=1, urls=[])),
        Path(config.run_dir),
        log_dir=engine_folder(config),
        token=os.environ.get(TOKEN_VARIABLE) or token_in(Path(config.run_dir) / TOKEN_FILE),
    )
    register_cleanup(engine.stop)
    progress.describe = lambda: f"the engine at {engine.address.url} ends too"
    with engine:
        print(f"loading {config.model.path}, log in {engine.log_path}", flush=True)
        engine.wait_ready()
        print(f"ready at {engine.address.url}, until Ctrl-C", flush=True)
        while True:
            engine.check()
            time.sleep(CHECK_SECONDS)


def engine_folder(config: Config) -> Path:
    """The folder of one engine's logs; several may be served in a `run_dir`."""
    return Path(config.run_dir) / "logs" / f"port_{config.rollout.port}"


def token_in(path: Path) -> str:
    """The token in a file that only its owner may read. If there is no file, it is created with a
    random token.

    Raises:
        ConfigError: others may read the file, or it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if not token or stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(
                f"{path}: expected a token in a file of mode 0600, got "
                f"{len(token)} characters and mode {stat.S_IMODE(path.stat().st_mode):04o}; "
                "delete it, and a new one is drawn"
            ) from None
    else:
        token = secrets.token_urlsafe(32)
        with os.fdopen(descriptor, "w") as file:
            file.write(token + "\n")
    print(f'token in {path}: export {TOKEN_VARIABLE}="$(cat {path})"', flush=True)
    return token


if __name__ == "__main__":
    sys.exit(run_command("One rollout engine, until Ctrl-C.", serve, folder_of=engine_folder))
