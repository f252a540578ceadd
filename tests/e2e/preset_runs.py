"""A replay of recorded rollouts under every named preset, one after the other in one process.

    python -m tests.e2e.preset_runs CONFIG FOLDER ROLLOUTS PRESET[:KEY=VALUE...]...

Each run goes to FOLDER/<preset>.
"""

from __future__ import annotations

import sys

from megatron_rl.config.file import load_config
from megatron_rl.process.command import Progress
from megatron_rl.train import train


def main(path: str, folder: str, rollouts: str, *presets: str) -> None:
    """Train with each preset in turn."""
    for each in presets:
        preset, *overrides = each.split(":")
        name = [f"objective.preset={preset}", f"run_dir={folder}/{preset}", f"replay={rollouts}"]
        train(load_config(path, [*name, *overrides]), Progress())


if __name__ == "__main__":
    main(*sys.argv[1:])
