"""Settings of what computes the learner's layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.choices import AttentionKernel, FP8Recipe, LayerImplementation
from megatron_rl.config.rules import literal_choices, require

# The number of positions on a rank must be a multiple of this for FP8 matrix products: their rows
# for a weight's gradient, in blocks of 128 with the recipe `blockwise`.
FP8_POSITIONS: dict[FP8Recipe, int] = {"none": 1, "delayed": 16, "current": 16, "blockwise": 128}


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """The implementations of the learner's layers. Everything but the defaults needs a GPU; what is
    asked for and is missing is an error at the start of a run.
    """

    # auto: Transformer Engine's layers on a GPU where it is installed, with its fused norms and
    # attention, otherwise Megatron's own
    layers: LayerImplementation = "auto"
    attention: AttentionKernel = "auto"  # of Transformer Engine's layers; auto: it chooses
    # scaling of FP8 matrix products in Transformer Engine's layers; weights, embedding, head and
    # attention stay in model.dtype. delayed: by the maxima of earlier steps; current: of the tensor
    # itself; blockwise: of blocks of 128
    fp8: FP8Recipe = "none"
    fused_rope: bool = False  # Transformer Engine's rotary embedding, in one kernel
    # adds the gradient of a weight to its float32 sum in the matrix product; needs Apex's extension
    # fused_weight_gradient_mlp_cuda
    fused_gradient_accumulation: bool = False
    # the same run on the same GPUs gives the same bits, at a cost in speed
    deterministic: bool = False

    def __post_init__(self) -> None:
        literal_choices(self)
        if self.layers == "megatron":
            for key, value, default in (
                ("attention", self.attention, "auto"),
                ("fp8", self.fp8, "none"),
                ("fused_rope", self.fused_rope, False),
            ):
                require(
                    value == default,
                    f"{key}: expected {default} with layers=megatron, since it is a part of "
                    f"Transformer Engine's layers, got {value}",
                )
