"""`python -m megatron_rl.serve CONFIG [--host INTERFACE] [--engines N] [key=value ...]`: starts
rollout engines for a run that does not start its own. CONFIG is the config of that run.

The engines are the same that a run would start (engine/server.py); they run until Ctrl-C. They
listen on loopback, or on the interface of `--host` (an interface, or its address; the same as
`rollout.host=`), on `rollout.port` and the ports after it. The run finds them in one of two ways:

- by the files that they leave in `run_dir`/engines when they are ready, if the run has the same
  `run_dir` and `rollout.placement=nodes`; then `rollout.port` may be 0;
- by their addresses: `rollout.num_engines=0 rollout.urls=[http://HOST:PORT]`.

The token is in `run_dir`/engine_token or in MEGATRON_RL_TOKEN. Engines on other hosts than the
learner's receive weights with `sync.transport=collective`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.engine.registry import register
from megatron_rl.engine.start import ALONE, listening_address, start_engines_of
from megatron_rl.engine.token import TOKEN_FILE, token_in
from megatron_rl.errors import ConfigError
from megatron_rl.process.command import Progress, run_command
from megatron_rl.process.lifetime import register_cleanup
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import read_geometry

CHECK_SECONDS = 0.5  # between checks of the engines' processes


def serve(config: Config, progress: Progress, *, num_engines: int = 0) -> None:
    """Start the engines and watch them. Never returns: it raises, or a signal ends the process.

    Args:
        num_engines: 0: as many as this host has GPUs for, or one without GPUs.
    """
    rollout, run_dir = config.rollout, Path(config.run_dir)
    if rollout.port == 0 and rollout.placement != "nodes":
        raise ConfigError(
            "rollout.port: expected the port that rollout.urls of the run will name, got 0; or set "
            "rollout.placement=nodes, and the run finds the engines by their files"
        )
    check_checkpoint(config.model.path, read_geometry(config.model.path))
    num_engines = num_engines or max(1, torch.cuda.device_count() // rollout.tensor_parallel)
    host = listening_address(rollout, ALONE)
    own = replace(rollout, num_engines=num_engines, urls=[], placement="share")
    engines = start_engines_of(
        replace(config, rollout=own),
        run_dir,
        log_dir=engine_folder(config),
        token=os.environ.get(TOKEN_VARIABLE) or _token(run_dir / TOKEN_FILE),
        host=host,
    )
    urls = ", ".join(engine.address.url for engine in engines)
    what = f"the engine{'s' if len(engines) > 1 else ''} at {urls}"
    progress.describe = lambda: f"{what} end{'s' if len(engines) == 1 else ''} too"
    with ExitStack() as stack:
        for engine in engines:
            register_cleanup(engine.stop)
            stack.enter_context(engine)
            print(f"loading {config.model.path}, log in {engine.log_path}", flush=True)
        for engine in engines:
            engine.wait_ready()
            file = register(run_dir, engine.address.url, engine.address.place)
            register_cleanup(partial(file.unlink, missing_ok=True))
            stack.callback(file.unlink, missing_ok=True)
        print(f"ready at {urls}, until Ctrl-C", flush=True)
        while True:
            for engine in engines:
                engine.check()
            time.sleep(CHECK_SECONDS)


def engine_folder(config: Config) -> Path:
    """The folder of this process's logs; engines of several hosts may have one `run_dir`."""
    if config.rollout.port:
        return Path(config.run_dir) / "logs" / f"port_{config.rollout.port}"
    return Path(config.run_dir) / "logs" / f"{socket.gethostname()}_{os.getpid()}"


def _token(path: Path) -> str:
    token = token_in(path)
    print(f'token in {path}: export {TOKEN_VARIABLE}="$(cat {path})"', flush=True)
    return token


def main(argv: list[str]) -> int:
    """Parse the options of this command, and leave the rest to `run_command`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="")
    parser.add_argument("--engines", type=int, default=0)
    options, rest = parser.parse_known_args(argv)
    if options.host:
        rest.append(f"rollout.host={options.host}")
    return run_command(
        "Rollout engines, until Ctrl-C. Also: --host INTERFACE (rollout.host), --engines N.",
        partial(serve, num_engines=options.engines),
        rest,
        folder_of=engine_folder,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
