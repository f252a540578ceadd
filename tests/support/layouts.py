"""The layouts of the learner that tests run on this machine's ranks, each with its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_rl.config import ParallelConfig

SP = {"tensor": 2, "sequence_parallel": True}
VPP = {"pipeline": 2, "virtual_pipeline": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Example: `Layout(ranks=2, sizes={"tensor": 2})`."""

    ranks: int
    sizes: Mapping[str, Any]

    def config(self) -> ParallelConfig:
        """The settings, with a timeout for tests."""
        return ParallelConfig(**self.sizes, timeout_seconds=60)


# Models need 4 attention heads and 4 layers for all of them.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        name: Layout(ranks=ranks, sizes=sizes)
        for name, ranks, sizes in (
            ("dp1", 1, {}),
            ("dp2", 2, {}),
            ("tp2", 2, {"tensor": 2}),
            ("tp2_sp", 2, SP),
            ("cp2", 2, {"context": 2}),
            ("pp2", 2, {"pipeline": 2}),
            ("pp2_vpp2", 2, VPP),
            ("pp2_uneven", 2, {"pipeline": 2, "stage_layers": [1, 3]}),
            ("tp4", 4, {"tensor": 4}),
            ("tp2_sp_cp2", 4, SP | {"context": 2}),
            ("tp2_sp_pp2_vpp2", 4, SP | VPP),
            ("cp2_pp2", 4, {"context": 2, "pipeline": 2}),
            ("cp2_pp2_vpp2", 4, VPP | {"context": 2}),
            ("cp2_dp2", 4, {"context": 2}),
        )
    }
)

# Models need 4 attention heads, 4 layers and experts whose number and columns are even.
EXPERT_LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        name: Layout(ranks=ranks, sizes=sizes)
        for name, ranks, sizes in (
            ("ep2", 2, {"expert": 2}),
            ("etp2", 2, {"expert_tensor": 2}),
            ("tp2_sp_ep2", 2, SP | {"expert": 2}),
            ("cp2_ep2", 2, {"context": 2, "expert": 2}),
            ("pp2_vpp2_ep2", 4, VPP | {"expert": 2}),
            ("tp2_sp_ep2_etp2", 4, SP | {"expert": 2, "expert_tensor": 2}),
        )
    }
)


def names_of(ranks: int) -> list[str]:
    """The layouts of a world of so many ranks."""
    return [name for name, layout in LAYOUTS.items() if layout.ranks == ranks]
