"""Every preset trains three steps on one recorded batch a step: what differs is the loss.

Sampling is the same under all presets but `dapo`, whose dynamic sampling test_dynamic_sampling.py
has on an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.config.presets import PRESETS
from tests.e2e.runs import read_jsonl
from tests.learner.recorded import NUM_HEAD, NUM_PROMPTS, NUM_SAMPLES
from tests.support.ranks import run_module

NUM_STEPS = 3
# Figures that only this preset's own code gives.
FIGURES = {
    "tis": "correction/weight/mean",
    "sequence_tis": "correction/weight/mean",
    "icepop": "correction/weight/mean",
    "sequence_mask": "correction/weight/mean",
    "cis": "correction/weight/mean",
    "mipu": "correction/weight/mean",
    "geometric_rejection": "correction/vetoed_sequences/mean",
    "k3_rejection": "correction/rejected_sequences/mean",
    "score_centering": "score_centering/size/mean",
    "score_centering_tis": "correction/weight/mean",
    "dc_grpo": "constraint/penalty/mean",
    "dc_grpo_centered": "constraint/penalty/mean",
    "dc_grpo_penalty": "constraint/penalty/mean",
    "dc_grpo_age_penalty": "constraint/penalty/mean",
    "dc_grpo_squared_difference": "constraint/penalty/mean",
    "dc_grpo_squared_ratio": "constraint/penalty/mean",
    "dc_grpo_squared_log_ratio": "constraint/penalty/mean",
    "dc_grpo_tis": "correction/weight/mean",
    "dc_grpo_score_centering": "score_centering/size/mean",
}
# Bounds for thousands of tokens and a gap of rounding, not for thirty and a gap of noise; and heads
# as they are recorded. A replay has no engine that could score an update (test_acceptance.py has
# one), or whose gap could be measured (test_stale_rollouts.py).
HEADS = [f"objective.score_centering.num_logprobs={NUM_HEAD}"]
CHANGES = {
    "mipu": ["objective.acceptance.enabled=false"],
    "dc_grpo_age_penalty": ["objective.constraint.tolerance_above=zero"],
    "geometric_rejection": ["objective.rejection.upper=1.2", "objective.rejection.lower=0.8"],
    "k3_rejection": ["objective.rejection.upper=0.05"],
    "score_centering": HEADS,
    "score_centering_tis": HEADS,
    "dc_grpo_score_centering": HEADS,
}
# What no preset has: a reference policy, entropy, a measured tolerance, a bound, mini-batches.
COMBINED = [
    "objective.constraint.tolerance=auto",
    "objective.constraint.tolerance_steps=2",
    "objective.constraint.max_penalty_share=0.0003",
    "objective.importance.batch_normalize=true",
    "objective.rejection.opsm_threshold=0.0001",
    "objective.entropy_coefficient=0.01",
    "objective.kl.coefficient=0.05",
    "learner.mini_batches_per_step=2",
]

Lines = list[dict[str, float]]


def run_presets(
    folder: Path,
    write_config: Callable[..., Path],
    model: Path,
    rollouts: Path,
    presets: dict[str, list[str]],
) -> dict[str, Lines]:
    """Run each preset with its overrides; the metrics of its steps."""
    config = write_config(
        folder,
        model={"path": str(model)},
        rollout={"sampling": {"max_tokens": 32}},
        learner={"tokens_per_micro_batch": 256, "optimizer": {"learning_rate": 1e-3}},
        loop={
            "num_steps": NUM_STEPS,
            "prompts_per_step": NUM_PROMPTS,
            "samples_per_prompt": NUM_SAMPLES,
        },
    )
    named = [":".join([name, *overrides]) for name, overrides in presets.items()]
    finished = run_module("tests.e2e.preset_runs", config, folder, rollouts, *named, ranks=0)
    (folder / "stdout").write_text(finished.stdout)
    return {name: read_jsonl(folder / name / "metrics.jsonl")[1:] for name in presets}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs of `steps_of`."""
    return tmp_path_factory.mktemp("presets")


@pytest.fixture(scope="module")
def steps_of(
    write_config: Callable[..., Path],
    tiny_checkpoint: Path,
    recorded_rollouts: Path,
    folder: Path,
) -> dict[str, Lines]:
    """The steps of every preset."""
    presets = {name: CHANGES.get(name, []) for name in PRESETS}
    return run_presets(folder, write_config, tiny_checkpoint, recorded_rollouts, presets)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_three_steps(preset: str, steps_of: dict[str, Lines]) -> None:
    steps = steps_of[preset]
    figure = FIGURES.get(preset, "loss/mean")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert all(math.isfinite(value) for value in line.values())
        assert line["discrepancy/mean"] > 0
        assert (line["constraint/lambda"] > 0) == preset.startswith(("dc_", "dual_"))
        assert figure in line, sorted(line)
        has_correction = any(key.startswith("correction/") for key in line)
        assert has_correction == figure.startswith("correction/")
        assert line["learner/grad_norm"] > 0


def test_presets_differ_in_their_gradients_and_so_in_their_weights(
    steps_of: dict[str, Lines],
) -> None:
    # The same rollouts and weights in the first step: what differs is the loss.
    first = {preset: steps[0]["learner/grad_norm"] for preset, steps in steps_of.items()}
    assert len(set(first.values())) >= 8, first
    # The same rollouts in the second step: what differs is the weights.
    second = {preset: steps[1]["discrepancy/mean"] for preset, steps in steps_of.items()}
    assert len(set(second.values())) >= 8, second


def test_a_run_says_which_keys_replace_those_of_its_preset(
    steps_of: dict[str, Lines], folder: Path
) -> None:
    said = [line for line in (folder / "stdout").read_text().splitlines() if " replaces " in line]
    assert said == [
        "objective.acceptance.enabled: false replaces true of objective.preset=mipu",
        "objective.rejection.lower: 0.8 replaces 0.999 of objective.preset=geometric_rejection",
        "objective.rejection.upper: 1.2 replaces 1.001 of objective.preset=geometric_rejection",
        "objective.rejection.upper: 0.05 replaces 0.01 of objective.preset=k3_rejection",
        "objective.constraint.tolerance_above: 'zero' replaces 'fresh_gap' of "
        "objective.preset=dc_grpo_age_penalty",
    ]


def test_combinations_with_the_constraint_and_a_reference(
    tmp_path: Path,
    write_config: Callable[..., Path],
    tiny_checkpoint: Path,
    recorded_rollouts: Path,
) -> None:
    combined = [*COMBINED, f"objective.kl.reference={tiny_checkpoint}"]
    [(first, second, third)] = run_presets(
        tmp_path, write_config, tiny_checkpoint, recorded_rollouts, {"dc_grpo_tis": combined}
    ).values()
    assert first["constraint/is_at_rest"] == 1 and "constraint/tolerance" not in first
    assert second["constraint/is_at_rest"] == 0 and second["constraint/tolerance"] > 0
    assert [line["constraint/lambda"] for line in (first, second, third)] == [0.0, 0.0, 0.1]
    assert third["constraint/tolerance"] == second["constraint/tolerance"]
    bound = 0.0003 / third["constraint/unit_penalty_share/mean"]
    assert 0 < third["constraint/next_lambda"] == pytest.approx(bound)
    assert third["reference/kl_k3/mean"] > first["reference/kl_k3/mean"] >= 0
