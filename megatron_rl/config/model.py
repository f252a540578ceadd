"""Settings of the model and of its parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.choices import DType
from megatron_rl.config.rules import above_zero, at_least, literal_choices


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The checkpoint that training starts from, and the learner's precision."""

    path: str = ""  # Hugging Face checkpoint folder: config.json, tokenizer, *.safetensors
    dtype: DType = "float32"  # of the learner; with bfloat16 the main weights stay float32

    def __post_init__(self) -> None:
        literal_choices(self)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the learner's parallel groups. The data-parallel size is the world size divided by
    them.
    """

    tensor: int = 1
    pipeline: int = 1
    # timeout of every collective. Ranks that do not use the engines wait in a collective while
    # other ranks start engines, sample, score and evaluate
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        at_least(1, tensor=self.tensor, pipeline=self.pipeline)
        above_zero(timeout_seconds=self.timeout_seconds)
