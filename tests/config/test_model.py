"""The rules of the settings of the learner's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import KernelConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value"), [("attention", "flash"), ("fp8", "current"), ("fused_rope", True)]
)
def test_parts_of_transformer_engine_need_its_layers(key: str, value: object) -> None:
    KernelConfig(**{key: value})
    KernelConfig(layers="transformer_engine", **{key: value})
    with pytest.raises(ConfigError, match=f"{key}: expected .* with layers=megatron"):
        KernelConfig(layers="megatron", **{key: value})


def test_fp8_is_for_bfloat16_and_rows_of_its_size(tmp_path: Path) -> None:
    kernels = KernelConfig(fp8="blockwise")
    ModelConfig(dtype="bfloat16", kernels=kernels)
    with pytest.raises(ConfigError, match=r"dtype: expected bfloat16 with kernels\.fp8=blockwise"):
        ModelConfig(kernels=kernels)
    path = tmp_path / "fp8.yaml"
    path.write_text("model: {dtype: bfloat16, kernels: {fp8: blockwise}}\n")
    with pytest.raises(ConfigError, match=r"parallel\.row_alignment: expected a multiple of 128"):
        load_config(path)
    aligned = load_config(path, ["parallel.row_alignment=128"])
    assert aligned.parallel.row_multiple == 128


@pytest.mark.parametrize(
    ("sizes", "multiple"),
    [
        ({"row_alignment": 16}, 16),
        # Two ranks with half a row each of a multiple of 16.
        ({"row_alignment": 16, "context": 2}, 32),
        ({"row_alignment": 16, "tensor": 2}, 16),
        ({"row_alignment": 16, "tensor": 2, "sequence_parallel": True, "context": 2}, 64),
        # Each of 3 ranks has two pieces, and a multiple of 3 positions.
        ({"row_alignment": 3, "context": 3}, 18),
        ({"context": 4}, 8),
    ],
)
def test_rows_are_multiples_for_every_rank(sizes: dict[str, int], multiple: int) -> None:
    assert ParallelConfig(**sizes).row_multiple == multiple


def test_weights_are_gathered_in_the_forward_pass_with_what_that_needs() -> None:
    OptimizerConfig(distributed=True, overlap_grad_reduce=True, overlap_param_gather=True)
    for settings in ({"distributed": True}, {"overlap_grad_reduce": True}):
        with pytest.raises(ConfigError, match="overlap_param_gather: expected distributed=true"):
            OptimizerConfig(overlap_param_gather=True, **settings)
