"""The objects with which rank 0 publishes weights and probes the engines, and the update log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.engine.requests import EnginePool
from megatron_rl.records import Prompt
from megatron_rl.rollout.environment import Environment
from megatron_rl.sync.publish import Publisher, PublishReport


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLink:
    """Everything that rank 0 needs to publish weights and to run the parity probe.

    Example: `EngineLink(publisher=Publisher(...), pool=HttpEnginePool(...),
    environment=SingleTurn(...), prompts=stream.prompts, log=Path("runs/a/sync.jsonl"))`.
    """

    publisher: Publisher
    pool: EnginePool
    environment: Environment
    prompts: Callable[[int, int], Sequence[Prompt]]  # first index and number -> prompts
    log: Path  # gains one line for each update


def log_update(path: Path, report: PublishReport) -> None:
    """Add the line of one update to `sync.jsonl`."""
    line = {
        "version": report.version,
        "bytes": report.num_bytes,
        "published": report.checksum,
        "received": report.received,
        "seconds": report.seconds,
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
