"""Three steps of every preset end to end, with one real vLLM server for all of them."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.config.presets import PRESETS
from megatron_rl.engine.server import start_engines
from megatron_rl.records import TOKEN_VARIABLE
from tests.e2e.launch import REPOSITORY, read_jsonl

NUM_STEPS = 3
# Figures that only this preset's own code gives.
FIGURES = {
    "tis": "correction/weight/mean",
    "sequence_tis": "correction/weight/mean",
    "icepop": "correction/weight/mean",
    "sequence_mask": "correction/weight/mean",
    "geometric_rejection": "correction/vetoed_sequences/mean",
    "k3_rejection": "correction/rejected_sequences/mean",
    "dc_grpo": "constraint/penalty/mean",
    "dc_grpo_centered": "constraint/penalty/mean",
    "dc_grpo_penalty": "constraint/penalty/mean",
    "dc_grpo_tis": "correction/weight/mean",
}


def run_presets(
    folder: Path, config: Path, checkpoint: Path, presets: tuple[str, ...]
) -> dict[str, list[dict[str, float]]]:
    """The lines of metrics of each preset's run."""
    token = secrets.token_urlsafe()
    [engine] = start_engines(
        RolloutConfig(
            dtype="bfloat16",
            num_threads=1,
            kv_cache_gib=0.1,
            max_num_seqs=64,
        ),
        model_path=str(checkpoint),
        log_dir=folder / "logs",
        token=token,
        seed=0,
        update_timeout_seconds=60.0,
    )
    with engine:
        engine.wait_ready()
        command = [sys.executable, "-m", "tests.e2e.preset_runs", str(config), str(folder)]
        finished = subprocess.run(
            [*command, engine.address.url, *presets],
            cwd=REPOSITORY,
            env=os.environ | {TOKEN_VARIABLE: token, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    assert finished.returncode == 0, finished.stdout[-6000:]
    return {name: read_jsonl(folder / name.split(":")[0] / "metrics.jsonl") for name in presets}


def test_every_preset_runs_three_steps(
    tmp_path: Path, write_config: Callable[..., Path], sharp_checkpoint: Path
) -> None:
    config = write_config(
        tmp_path,
        rollout={"dtype": "bfloat16", "num_threads": 1, "sampling": {"max_tokens": 12}},
        learner={"tokens_per_micro_batch": 256, "optimizer": {"learning_rate": 1e-3}},
        loop={"num_steps": NUM_STEPS, "prompts_per_step": 4, "samples_per_prompt": 4},
    )
    # The bound of 0.1% around a geometric mean of 1 is for thousands of tokens, not for twelve.
    wide = {"geometric_rejection": "geometric_rejection:objective.rejection.upper=1.05"}
    presets = tuple(wide.get(name, name) for name in PRESETS)
    lines = run_presets(tmp_path, config, sharp_checkpoint, presets)
    for preset, of_steps in lines.items():
        name = preset.split(":")[0]
        steps = [line for line in of_steps if line["step"] > 0]
        assert [line["step"] for line in steps] == [1, 2, 3], preset
        for line in steps:
            assert all(math.isfinite(value) for value in line.values()), preset
            assert line["discrepancy/mean"] > 0, preset  # another precision
            has_constraint = name.startswith("dc_")
            assert (line["constraint/lambda"] > 0) == has_constraint, preset
            assert (FIGURES.get(name, "loss/mean")) in line, (preset, sorted(line))
            assert any(key.startswith("correction/") for key in line) == (
                "correction" in FIGURES.get(name, "")
            )
        assert all(line["learner/grad_norm"] > 0 for line in steps), preset
        published = {line["published"] for line in read_jsonl(tmp_path / name / "sync.jsonl")}
        assert len(published) == NUM_STEPS + 1, preset
    # The same prompts, seeds and weights: what differs in the first step is the loss.
    first = {preset: of_steps[1]["learner/grad_norm"] for preset, of_steps in lines.items()}
    assert len(set(first.values())) >= 8, first


@pytest.mark.slow
def test_combinations_with_the_constraint_and_a_reference(
    tmp_path: Path, write_config: Callable[..., Path], sharp_checkpoint: Path
) -> None:
    """What no preset has: a reference policy, entropy, a measured tolerance, mini-batches."""
    config = write_config(
        tmp_path,
        rollout={"dtype": "bfloat16", "num_threads": 1, "sampling": {"max_tokens": 12}},
        learner={
            "tokens_per_micro_batch": 256,
            "mini_batches_per_step": 2,
            "optimizer": {"learning_rate": 1e-3},
        },
        loop={"num_steps": NUM_STEPS, "prompts_per_step": 4, "samples_per_prompt": 4},
    )
    mixed = ":".join(
        [
            "dc_grpo_tis",
            "objective.constraint.tolerance=auto",
            "objective.constraint.tolerance_steps=2",
            "objective.importance.batch_normalize=true",
            "objective.rejection.opsm_threshold=0.0001",
            "objective.entropy_coefficient=0.01",
            "objective.kl.coefficient=0.05",
            f"objective.kl.reference={sharp_checkpoint}",
        ]
    )
    [of_steps] = run_presets(tmp_path, config, sharp_checkpoint, (mixed,)).values()
    first, second, third = (line for line in of_steps if line["step"] > 0)
    assert first["constraint/is_at_rest"] == 1 and "constraint/tolerance" not in first
    assert second["constraint/is_at_rest"] == 0 and second["constraint/tolerance"] > 0
    assert [line["constraint/lambda"] for line in (first, second, third)] == [0.0, 0.0, 0.1]
    assert third["constraint/tolerance"] == second["constraint/tolerance"]
    assert third["reference/kl_k3/mean"] > first["reference/kl_k3/mean"] >= 0
