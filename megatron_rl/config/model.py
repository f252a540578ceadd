"""The model, and how it is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.rules import above_zero, at_least, one_of


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""  # Hugging Face checkpoint folder: config.json, tokenizer, *.safetensors
    dtype: str = "float32"  # of the learner: float32, bfloat16 (main weights stay float32)

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1  # data parallel is what the world size leaves
    # of every collective; ranks that talk to no engine wait in one while others start engines,
    # sample, score and evaluate
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        at_least(1, tensor=self.tensor, pipeline=self.pipeline)
        above_zero(timeout_seconds=self.timeout_seconds)
