"""What is made of scored rollouts: the over-long penalty, what is kept, which groups have signal;
and a training step that only measures what was dropped, in every layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_rl.config import (
    Config,
    DynamicSamplingConfig,
    LoopConfig,
    OverlongConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.loop.collect import has_signal, judge
from megatron_rl.records import Prompt, Rollout, RolloutGroup, SampledStep, Score
from tests.learner.recorded import NUM_PROMPTS, NUM_SAMPLES
from tests.torchrun import run_module

MAX_TOKENS = 10


def make_group(index: int, *lengths: int) -> RolloutGroup:
    """Responses of so many tokens; those of MAX_TOKENS were cut."""
    prompt = Prompt(index=index, source="task", text="1+1=", token_ids=(1,), answer="2")
    rollouts = tuple(
        Rollout(
            token_ids=(1, *[5] * length),
            loss_mask=(False, *[True] * length),
            rollout_logprobs=(0.0, *[-0.5] * length),
            weight_versions=(-1, *[0] * length),
            finish_reason="length" if length == MAX_TOKENS else "stop",
            text="2",
        )
        for length in lengths
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def make_scores(*rewards: float | None) -> tuple[Score, ...]:
    """None: the verifier failed."""
    return tuple(
        Score(reward=r or 0.0, is_formatted=True, failure="timeout" if r is None else None)
        for r in rewards
    )


def judged(
    groups: list[RolloutGroup],
    scores: list[tuple[Score, ...]],
    *,
    is_dynamic: bool = False,
    **overlong: float,
) -> SampledStep:
    config = Config(
        loop=LoopConfig(dynamic_sampling=DynamicSamplingConfig(enabled=is_dynamic)),
        reward=RewardConfig(overlong=OverlongConfig(**overlong)),
        rollout=RolloutConfig(sampling=SamplingConfig(max_tokens=MAX_TOKENS)),
    )
    return judge(config, groups, scores, num_prompts=len(groups), num_rounds=1)


def test_by_default_everything_is_kept() -> None:
    step = judged([make_group(0, 3, MAX_TOKENS)], [make_scores(1.0, 1.0)])
    assert step.is_kept == [[True, True]]
    assert step.penalties == [[0.0, 0.0]]
    assert step.advantages == [[0.0, 0.0]]


def test_groups_without_signal_are_dropped() -> None:
    groups = [make_group(index, 3, 4) for index in range(4)]
    scores = [
        make_scores(1.0, 0.0),
        make_scores(1.0, 1.0),
        make_scores(0.0, 0.0),
        make_scores(None, 1.0),  # a failure has the others' mean, so nothing differs
    ]
    step = judged(groups, scores, is_dynamic=True)
    assert step.is_kept == [[True, True], [False, False], [False, False], [False, False]]
    assert [len(each) for each in step.advantages] == [2, 2, 2, 2]  # all of them are measured


def test_length_makes_signal() -> None:
    """Two right answers, one of them 2 of 4 tokens into the buffer; the third failed."""
    step = judged(
        [make_group(0, 3, 8, 8)],
        [make_scores(1.0, 1.0, None)],
        is_dynamic=True,
        buffer_tokens=4,
        penalty=1.0,
    )
    assert step.penalties == [[0.0, -0.5, -0.5]]
    # Rewards 1, 0.5 and their mean.
    assert step.advantages[0] == pytest.approx([1.2247, -1.2247, 0.0], abs=1e-4)
    assert step.is_kept == [[True, True, True]]
    assert [score.reward for score in step.scores[0]] == [1.0, 1.0, 0.0]  # as the verifier said


def test_cut_responses_are_masked_and_give_no_signal() -> None:
    groups = [make_group(0, 3, 4, MAX_TOKENS), make_group(1, 3, 4, MAX_TOKENS)]
    scores = [make_scores(1.0, 0.0, 0.0), make_scores(1.0, 1.0, 1.0)]
    step = judged(groups, scores, mask_truncated=True)
    assert step.is_kept == [[True, True, False]] * 2
    assert step.advantages[0][2] < 0  # it belongs to its group's mean
    dynamic = judged(groups, scores, is_dynamic=True, mask_truncated=True)
    assert dynamic.is_kept == [[True, True, False], [False] * 3]


def test_signal_of_a_masked_response_does_not_count() -> None:
    assert has_signal([0.0, 0.5], [True, True])
    assert not has_signal([0.0, 0.5], [True, False])
    assert not has_signal([], [])


def replay(
    folder: Path, model: Path, rollouts: Path, *overrides: str, ranks: int
) -> list[dict[str, float]]:
    """The metrics of two recorded steps; of each, the third of four groups has equal rewards."""
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "replay": str(rollouts),
        "data": {
            "tasks": [{"path": str(folder / "prompts.jsonl"), "verifier": "exact"}],
            "num_held_out": 0,
        },
        "rollout": {"sampling": {"max_tokens": 32}},
        "learner": {"tokens_per_micro_batch": 64, "optimizer": {"learning_rate": 1e-3}},
        "objective": {"constraint": {"initial": 0.5}},
        "loop": {
            "num_steps": 2,
            "prompts_per_step": NUM_PROMPTS,
            "samples_per_prompt": NUM_SAMPLES,
        },
        "checkpoint": {"every": 0, "save_hf": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    run_module("megatron_rl.train", folder / "config.yaml", *overrides, ranks=ranks)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines[1:]
    ]


def test_what_was_dropped_is_measured_and_not_learnt_from(
    tiny_checkpoint: Path, recorded_rollouts: Path, tmp_path: Path
) -> None:
    def run(name: str, *overrides: str, ranks: int = 1) -> list[dict[str, float]]:
        return replay(tmp_path / name, tiny_checkpoint, recorded_rollouts, *overrides, ranks=ranks)

    dynamic = "loop.dynamic_sampling.enabled=true"
    all_kept = run("all", "learner.mini_batches_per_step=3")
    expected = run("dynamic", dynamic, "learner.mini_batches_per_step=3")
    first, first_of_all = expected[0], all_kept[0]
    assert first_of_all["rollout/kept_rate/mean"] == 1.0
    assert first["rollout/kept_rate/mean"] == 0.75
    assert first["rollout/num_prompts"] == NUM_PROMPTS
    # Of the same weights and the same tokens, so also lambda takes the same step.
    for key, value in first_of_all.items():
        if key.startswith("discrepancy/") or key == "constraint/next_lambda":
            assert first[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert first["loss/mean"] != pytest.approx(first_of_all["loss/mean"], rel=1e-2)
    for name, override in (("dp2", "parallel.tensor=1"), ("pp2", "parallel.pipeline=2")):
        got = run(name, dynamic, "learner.mini_batches_per_step=3", override, ranks=2)
        assert [line.keys() for line in got] == [line.keys() for line in expected]
        for line, other in zip(got, expected, strict=True):
            for key, value in other.items():
                assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)


def test_a_step_without_any_signal_is_only_measured(
    tiny_checkpoint: Path, recorded_rollouts: Path, tmp_path: Path
) -> None:
    """A huge epsilon makes every advantage 0."""
    lines = replay(
        tmp_path / "nothing",
        tiny_checkpoint,
        recorded_rollouts,
        "loop.dynamic_sampling.enabled=true",
        "objective.advantage_epsilon=1e60",
        ranks=1,
    )
    for line in lines:
        assert line["rollout/kept_rate/mean"] == 0.0
        assert line["discrepancy/mean"] > 1e-3
        assert line["learner/grad_norm"] == 0.0
        assert "loss/mean" not in line
