"""The layouts of the parity tests, with the models that run in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config import ParallelConfig

SP = {"sequence_parallel": True}
# Every kind of norm, bias, head and rope; layouts without `models` run all that are dense.
UNALIKE = ("qwen3", "qwen2_tied", "llama")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of one world size, and how its rows are packed."""

    name: str
    world_size: int
    tensor: int = 1
    pipeline: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)  # of the layout
    recomputation: str = "none"  # of activations
    is_packed: bool = True
    is_distributed: bool = False  # the optimizer
    dtype: str = "float32"
    models: tuple[str, ...] = ()  # none: all that are dense

    @property
    def layout(self) -> ParallelConfig:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline}
        return ParallelConfig(**sizes, **self.more, timeout_seconds=60)


CASES = (
    Case(name="tp1", world_size=1),
    Case(name="tp1_unpacked", world_size=1, is_packed=False),
    Case(name="tp2", world_size=2, tensor=2),
    Case(name="tp2_unpacked", world_size=2, tensor=2, is_packed=False, models=UNALIKE),
    Case(name="pp2", world_size=2, pipeline=2),
    Case(name="pp2_unpacked", world_size=2, pipeline=2, is_packed=False, models=UNALIKE),
    Case(name="dp2", world_size=2),
    Case(name="dp2_unpacked", world_size=2, is_packed=False, models=UNALIKE),
    Case(name="dp2_distributed", world_size=2, is_distributed=True, models=UNALIKE),
    Case(name="tp2_pp2", world_size=4, tensor=2, pipeline=2, models=UNALIKE),
    Case(
        name="tp2_pp2_unpacked",
        world_size=4,
        tensor=2,
        pipeline=2,
        is_packed=False,
        models=("qwen3", "qwen2_tied"),
    ),
    Case(name="tp1_full", world_size=1, recomputation="full", models=("qwen3",)),
    Case(name="tp1_selective", world_size=1, recomputation="selective", models=("qwen3",)),
    Case(name="tp2_sp", world_size=2, tensor=2, more=SP, models=("qwen3", "qwen2_tied", "qwen2")),
    Case(
        name="tp2_sp_full",
        world_size=2,
        tensor=2,
        more=SP,
        recomputation="full",
        models=("qwen3",),
    ),
    Case(
        name="pp2_vpp2",
        world_size=2,
        pipeline=2,
        more={"virtual_pipeline": 2},
        models=("qwen3", "qwen2_tied"),
    ),
    Case(
        name="pp2_uneven",
        world_size=2,
        pipeline=2,
        more={"stage_layers": [1, 3]},
        recomputation="selective",
        models=("qwen3",),
    ),
    Case(
        name="cp2", world_size=2, more={"context": 2}, models=("qwen3", "qwen2_tied", "llama_tied")
    ),
    Case(
        name="cp2_unpacked",
        world_size=2,
        more={"context": 2},
        is_packed=False,
        recomputation="full",
        models=("qwen2",),
    ),
    Case(
        name="tp2_sp_cp2",
        world_size=4,
        tensor=2,
        more=SP | {"context": 2},
        models=("qwen3",),
    ),
    Case(name="cp2_dp2", world_size=4, more={"context": 2}, models=("qwen2",)),
    Case(
        name="cp2_pp2_vpp2",
        world_size=4,
        pipeline=2,
        more={"context": 2, "virtual_pipeline": 2},
        recomputation="selective",
        models=("qwen2_tied",),
    ),
    Case(name="tp4", world_size=4, tensor=4, models=("qwen3", "qwen2")),
    Case(
        name="tp2_sp_pp2_vpp2",
        world_size=4,
        tensor=2,
        pipeline=2,
        more=SP | {"virtual_pipeline": 2},
        models=("qwen2_tied",),
    ),
    Case(name="tp2_dp2", world_size=4, tensor=2, models=("qwen2_tied",)),
    Case(name="pp2_dp2", world_size=4, pipeline=2, models=("qwen2_tied",)),
)
MOE_CASES = (
    Case(name="tp1", world_size=1, models=("qwen3_moe", "qwen2_moe", "mixtral")),
    Case(name="tp1_unpacked", world_size=1, is_packed=False, models=("qwen3_moe", "mixtral")),
    Case(name="tp1_full", world_size=1, recomputation="full", models=("qwen3_moe",)),
    Case(name="tp1_selective", world_size=1, recomputation="selective", models=("qwen3_moe",)),
    Case(
        name="ep2", world_size=2, more={"expert": 2}, models=("qwen3_moe", "qwen2_moe", "mixtral")
    ),
    Case(
        name="ep2_unpacked",
        world_size=2,
        more={"expert": 2},
        is_packed=False,
        models=("qwen2_moe",),
    ),
    Case(
        name="ep2_full",
        world_size=2,
        more={"expert": 2},
        recomputation="full",
        models=("qwen3_moe",),
    ),
    Case(
        name="ep2_distributed",
        world_size=2,
        more={"expert": 2},
        is_distributed=True,
        models=("qwen3_moe",),
    ),
    Case(
        name="tp2_sp_ep2",
        world_size=2,
        tensor=2,
        more=SP | {"expert": 2},
        recomputation="selective",
        models=("qwen3_moe", "qwen2_moe"),
    ),
    Case(name="tp2_sp", world_size=2, tensor=2, more=SP, models=("mixtral",)),
    Case(name="etp2", world_size=2, more={"expert_tensor": 2}, models=("qwen3_moe", "mixtral")),
    Case(
        name="tp2_sp_etp2",
        world_size=2,
        tensor=2,
        more=SP | {"expert_tensor": 2},
        models=("qwen2_moe",),
    ),
    Case(
        name="pp2_vpp2_ep2",
        world_size=4,
        pipeline=2,
        more={"virtual_pipeline": 2, "expert": 2},
        recomputation="full",
        models=("qwen3_moe",),
    ),
    Case(
        name="cp2_ep2",
        world_size=2,
        more={"context": 2, "expert": 2},
        models=("qwen3_moe",),
    ),
    Case(
        name="tp2_sp_ep2_etp2",
        world_size=4,
        tensor=2,
        more=SP | {"expert": 2, "expert_tensor": 2},
        models=("qwen2_moe",),
    ),
)
BFLOAT16_MODELS = ("qwen3", "qwen2_tied")
BFLOAT16_CASES = tuple(
    Case(world_size=2, dtype="bfloat16", models=BFLOAT16_MODELS, **layout)
    for layout in (
        {"name": "bf16_tp2", "tensor": 2},
        {"name": "bf16_dp2_distributed", "is_distributed": True},
    )
)
