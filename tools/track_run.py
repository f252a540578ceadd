"""Writes the metrics of a run that has ended, or was killed, to trackers:

    python tools/track_run.py runs/a wandb mlflow [tracking.mode=online ...]

Offline the trackers' files are written anew; online the whole run is sent as a new one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.file import load_config
from megatron_rl.errors import DataError
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.observe.trackers import finite, start_trackers
from megatron_rl.process.tool import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Write the metrics of a run to trackers.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("trackers", nargs="+", help="names, and overrides such as tracking.name=x")
    arguments = parser.parse_args(argv)
    names = [each for each in arguments.trackers if "=" not in each]
    overrides = [each for each in arguments.trackers if "=" in each]
    return run_tool("track_run", lambda: _track(arguments.run_dir, names, overrides))


def _track(run_dir: Path, names: Sequence[str], overrides: Sequence[str]) -> None:
    config = load_config(
        run_dir / "config.yaml",
        [f"run_dir={run_dir}", f"tracking.trackers=[{','.join(names)}]", *overrides],
    )
    history = read_metrics(run_dir / "metrics.jsonl")
    if not history:
        raise DataError(f"{run_dir / 'metrics.jsonl'}: expected the lines of a run, got none")
    is_online = config.tracking.mode == "online"
    trackers = start_trackers(config, run_dir, is_new=is_online, history=history)
    for tracker in trackers:
        for record in history if is_online else ():
            tracker.write(record["step"], finite(record))
        tracker.close()
        print(f"{len(history)} lines: {tracker.hint}")


if __name__ == "__main__":
    sys.exit(main())
