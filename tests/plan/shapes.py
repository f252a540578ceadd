"""The shapes of published models, and plans, that tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.plan.layout import ClusterLayout

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


def layout(**changes: Any) -> ClusterLayout:
    """One rank in bfloat16, with changes."""
    single = ClusterLayout(
        num_nodes=1,
        gpus_per_node=1,
        tensor=1,
        pipeline=1,
        data=1,
        dtype="bfloat16",
        has_distributed_optimizer=False,
    )
    return replace(single, **changes)
