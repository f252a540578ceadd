"""The bytes of a sync that a worker of an engine keeps, counted by hand and by vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rl.config import Config, QuantizationConfig, RolloutConfig
from megatron_rl.plan.slices import worker_bytes
from megatron_rl.weights.geometry import read_geometry
from tests.plan.shapes import SHAPES
from tests.plan.support.vllm_slices import TAKEN
from tests.support.ranks import ROOT
from tests.sync.tiny_checkpoints import write_checkpoint


def config(tensor_parallel: int, quantization: str = "none") -> Config:
    return Config(
        rollout=RolloutConfig(
            tensor_parallel=tensor_parallel,
            quantization=QuantizationConfig(format=quantization),
        )
    )


# Qwen3-8B, elements of a layer at TP8: queries and output 4096 x 4096 / 8 each, keys and values
# 1024 x 4096 / 8 each, three matrices of 4096 x 12288 / 8, norms of 4096 and of 128, two each; and
# 151936 / 8 rows of 4096 columns twice, and the last norm. At TP16 the 8 key and value heads are
# divided by 8 alone.
BY_HAND = {
    8: 36 * (2 * 2_097_152 + 2 * 524_288 + 18_874_368 + 8_448) + 2 * 18_992 * 4096 + 4096,
    16: 36 * (2 * 1_048_576 + 2 * 524_288 + 9_437_184 + 8_448) + 2 * 9_496 * 4096 + 4096,
}


@pytest.mark.parametrize("tensor_parallel", [8, 16])
def test_a_worker_of_an_8b_model_keeps_its_heads_columns_and_rows(tensor_parallel: int) -> None:
    geometry = read_geometry(SHAPES / "Qwen3-8B")
    found = worker_bytes(config(tensor_parallel), geometry, torch.bfloat16)
    assert found == 2 * BY_HAND[tensor_parallel]


def test_scales_of_rows_are_divided_and_those_of_columns_are_not(tmp_path: Path) -> None:
    """Per layer in INT8: of queries [128,128], keys and values [64,128], gate and up [256,128] a
    half, with half of their scales; of the output [128,128] and down [128,256] a half, with all 128
    scales; norms 2 x 128 + 2 x 32.
    """
    geometry = read_geometry(write_checkpoint(tmp_path / "model", "bfloat16", 0))
    weights = (128 * 128 + 2 * 64 * 128 + 2 * 256 * 128 + 128 * 128 + 128 * 256) // 2
    scales = 4 * ((128 + 2 * 64 + 2 * 256) // 2 + 128 + 128)
    layer = weights + scales + 2 * (2 * 128 + 2 * 32)
    rest = 2 * (2 * 64 * 128 + 128)  # embedding and head, by rows of the vocabulary; the last norm
    found = worker_bytes(config(2, "int8_w8a8"), geometry, torch.bfloat16)
    assert found == 2 * layer + rest


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["untied", "tied", "biased", "moe"])
def test_vllms_dry_run_of_two_workers_counts_the_same(variant: str, tmp_path: Path) -> None:
    """Real workers, on CPUs; on 2026-11-30 equal for `untied` and `moe`, a minute each."""
    folder = write_checkpoint(tmp_path / "model", variant, 0)
    found = subprocess.run(
        [sys.executable, "-m", "tests.plan.support.vllm_slices", str(folder), "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    [told] = [line for line in found.stdout.splitlines() if line.startswith(TAKEN)]
    kept = worker_bytes(config(2), read_geometry(folder), torch.float32)
    assert json.loads(told.removeprefix(TAKEN)) == [kept, kept]
