"""Settings of the model and of its parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_rl.config.choices import (
    ActivationRecomputation,
    AttentionKernel,
    DType,
    FP8Recipe,
    LayerImplementation,
)
from megatron_rl.config.rules import above_zero, at_least, literal_choices, require

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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The checkpoint that training starts from, and the learner's precision."""

    # Hugging Face checkpoint folder: config.json, tokenizer, *.safetensors; or the name of a model
    # in the hub's local cache
    path: str = ""
    dtype: DType = "float32"  # of the learner; with bfloat16 the main weights stay float32
    # activations that the backward pass computes again, to save memory. selective: those of
    # attention and of feed-forward layers, dense and mixtures; full: of whole layers, of which only
    # the input is kept
    activation_recomputation: ActivationRecomputation = "none"
    kernels: KernelConfig = field(default_factory=KernelConfig)

    def __post_init__(self) -> None:
        literal_choices(self)
        require(
            self.kernels.fp8 == "none" or self.dtype == "bfloat16",
            f"dtype: expected bfloat16 with kernels.fp8={self.kernels.fp8}, got {self.dtype}",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the learner's parallel groups. The data-parallel size is the world size divided by
    them.
    """

    tensor: int = 1
    # divides the activations of norms and residuals along the row over the tensor-parallel ranks
    sequence_parallel: bool = False
    context: int = 1  # ranks that share each row, every sequence divided among them
    expert: int = 1  # ranks among which the experts are divided; they are of several replicas
    expert_tensor: int = 1  # ranks that hold a shard of each expert, independently of `tensor`
    pipeline: int = 1
    virtual_pipeline: int = 1  # parts of the model on each pipeline rank, for a smaller bubble
    # decoder layers of each part of the pipeline, in layer order: pipeline x virtual_pipeline
    # numbers, for stages of different sizes; []: as many layers in every part
    stage_layers: list[int] = field(default_factory=list)
    # the positions that a rank has of a row are a multiple of this, as FP8 products need it
    row_alignment: int = 1
    # timeout of every collective. Ranks that do not use the engines wait in a collective while
    # other ranks start engines, sample, score and evaluate
    timeout_seconds: float = 1800.0

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor * self.context * self.pipeline

    def __post_init__(self) -> None:
        at_least(
            1,
            tensor=self.tensor,
            context=self.context,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            row_alignment=self.row_alignment,
        )
        require(
            self.tensor > 1 or not self.sequence_parallel,
            "sequence_parallel: expected false with tensor=1, as it divides a row over the "
            "tensor-parallel ranks, got true",
        )
        require(
            self.pipeline > 1 or self.virtual_pipeline == 1,
            "virtual_pipeline: expected 1 with pipeline=1, which has no bubble, got "
            f"{self.virtual_pipeline}",
        )
        num_parts = self.pipeline * self.virtual_pipeline
        require(
            not self.stage_layers or len(self.stage_layers) == num_parts,
            f"stage_layers: expected {num_parts} numbers (pipeline x virtual_pipeline), got "
            f"{len(self.stage_layers)}",
        )
        require(
            all(layers >= 1 for layers in self.stage_layers),
            f"stage_layers: expected at least 1 layer in every part, got {self.stage_layers}",
        )
        above_zero(timeout_seconds=self.timeout_seconds)

    @property
    def row_multiple(self) -> int:
        """The number of positions of a row must be a multiple of this."""
        ranks = self.tensor if self.sequence_parallel else 1
        return ranks * math.lcm(self.sequence_multiple, self.context * self.row_alignment)

    @property
    def sequence_multiple(self) -> int:
        """The number of positions of every sequence in a row, with its padding, must be a multiple
        of this: context parallelism cuts a sequence into two pieces for each rank.
        """
        return 2 * self.context if self.context > 1 else 1

    @property
    def rows_per_group(self) -> int:
        """The number of rows of a pass must be a multiple of this: the schedule of a virtual
        pipeline gives every part of the model as many rows in turn as there are pipeline ranks.
        """
        return self.pipeline if self.virtual_pipeline > 1 else 1
