"""A short run of every named preset, one after the other in one process, on one given server.

    MEGATRON_RL_TOKEN=... python -m tests.e2e.preset_runs CONFIG FOLDER URL PRESET[:KEY=VALUE...]...

Each run goes to FOLDER/<preset>.
"""

from __future__ import annotations

import sys

from megatron_rl.config.file import load_config
from megatron_rl.process.command import Progress
from megatron_rl.train import train


def main(path: str, folder: str, url: str, *presets: str) -> None:
    for each in presets:
        preset, *overrides = each.split(":")
        given = ["rollout.num_engines=0", f"rollout.urls=['{url}']"]
        name = [f"objective.preset={preset}", f"run_dir={folder}/{preset}"]
        train(load_config(path, [*given, *name, *overrides]), Progress())


if __name__ == "__main__":
    main(*sys.argv[1:])
