"""Engines of lower precision, for real: a run quantises at every sync, the probe watches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_rl.config import QuantizationConfig
from megatron_rl.weights.quantization import is_quantized, rounded
from tests.e2e.gaps import BOUND, gaps_of_step
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine

LOOP = {"num_steps": 2, "prompts_per_step": 8, "samples_per_prompt": 8}


def test_an_engine_serves_exactly_the_rounded_weights(
    tmp_path: Path,
    write_config: Callable[..., Path],
    sharp_checkpoint: Path,
    served_engine: ServedEngine,
) -> None:
    """A large gap to the learner, and none to a learner that holds the rounded weights."""
    settings = {"format": "int4", "strategy": "group", "group_size": 32}
    config = write_config(
        tmp_path,
        learner={"optimizer": {"learning_rate": 0.0}},
        sync={"probe_tolerance": 0.5},  # random weights of this model hardly survive INT4
        loop=LOOP,
    )
    overrides = [f"rollout.quantization.{key}={value}" for key, value in settings.items()]
    train_to_the_end(
        config, *overrides, num_ranks=1, run_dir=tmp_path / "run", engine=served_engine
    )
    gaps, _ = gaps_of_step(tmp_path / "run" / "rollouts", 2)
    assert gaps.mean() > 1000 * BOUND

    on_grid = tmp_path / "rounded"
    on_grid.mkdir()
    for file in sharp_checkpoint.iterdir():
        (on_grid / file.name).write_bytes(file.read_bytes())
    tensors = load_file(on_grid / "model.safetensors")
    for name, tensor in tensors.items():
        if is_quantized(name):
            tensors[name] = rounded(QuantizationConfig(**settings), tensor)
    save_file(tensors, on_grid / "model.safetensors", metadata={"format": "pt"})
    train_to_the_end(
        config,
        f"replay={tmp_path / 'run' / 'rollouts'}",
        f"model.path={on_grid}",
        num_ranks=1,
        run_dir=tmp_path / "replayed",
    )
    of_run, of_replay = (
        [line["discrepancy/max"] for line in read_jsonl(tmp_path / name / "metrics.jsonl")[-2:]]
        for name in ("run", "replayed")
    )
    print(f"largest gap: {max(of_run):.3g} to the learner, {max(of_replay):.2g} to rounded weights")
    assert max(of_replay) <= BOUND < max(of_run)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["quantization.format=int8_w8a8"], id="int8_w8a8"),
        pytest.param(["kv_cache_dtype=fp8"], id="fp8_kv_cache", marks=pytest.mark.slow),
        pytest.param(
            ["quantization.format=fp8", "quantization.strategy=block"],
            id="fp8_weights",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_quantised_engine_is_trained_with(
    overrides: list[str], tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(tmp_path, loop=LOOP, sync={"probe_tolerance": 0.1})
    settings = [f"rollout.{override}" for override in ["dtype=bfloat16", *overrides]]
    train_to_the_end(config, *settings, num_ranks=1, run_dir=tmp_path / "run")
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    gaps = [line["discrepancy/mean"] for line in lines if "discrepancy/mean" in line]
    print(f"{' '.join(overrides)}: mean discrepancy {gaps}")
    assert len(gaps) == LOOP["num_steps"]
    assert all(math.isfinite(gap) and 1e-4 < gap < 0.1 for gap in gaps)
    assert all(line["sync/probe_gap/mean"] > 0 for line in lines)
    updates = read_jsonl(tmp_path / "run" / "sync.jsonl")
    assert len({line["published"] for line in updates}) == LOOP["num_steps"] + 1
