"""Rules between sections: what needs engines, or freshly published weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_rl.config import (
    AcceptanceConfig,
    CheckpointConfig,
    Config,
    ConstraintConfig,
    EvalConfig,
    LearnerConfig,
    LoopConfig,
    ObjectiveConfig,
    ParallelConfig,
    RolloutConfig,
    SamplingConfig,
    SyncConfig,
)
from megatron_rl.config.learner import MoeConfig
from megatron_rl.errors import ConfigError


def test_what_needs_fresh_engines_falls_on_a_published_step() -> None:
    config = Config(
        sync=SyncConfig(every=4),
        checkpoint=CheckpointConfig(every=8),
        eval=EvalConfig(every=0),
        loop=LoopConfig(num_steps=12),
    )
    for section, key, value in (
        ("checkpoint", "every", 6),
        ("eval", "every", 2),
        ("loop", "num_steps", 10),
    ):
        changed = replace(getattr(config, section), **{key: value})
        expected = rf"{section}\.{key}: expected a multiple of sync\.every=4, .*got {value}"
        with pytest.raises(ConfigError, match=expected):
            replace(config, **{section: changed})
    with pytest.raises(ConfigError, match="every: expected at least 1"):
        SyncConfig(every=0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"sequence_parallel": True}, "sequence_parallel: expected false with tensor=1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline: expected 1 with pipeline=1"),
        ({"pipeline": 2, "stage_layers": [1]}, r"stage_layers: expected 2 numbers"),
        ({"pipeline": 2, "stage_layers": [4, 0]}, "stage_layers: expected at least 1 layer"),
    ],
)
def test_layouts_that_contradict_themselves(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**layout)


def test_ranks_that_share_a_row_get_equal_parts() -> None:
    layout = ParallelConfig(tensor=3, sequence_parallel=True)
    assert (layout.row_multiple, ParallelConfig(tensor=3).row_multiple) == (3, 1)
    Config(parallel=layout, learner=LearnerConfig(tokens_per_micro_batch=4098))
    with pytest.raises(ConfigError, match="tokens_per_micro_batch: expected a multiple of 3"):
        Config(parallel=layout)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"replay": "runs/a/rollouts"}, "expected false in a replay"),
        ({"sync": SyncConfig(every=2)}, "expected false with sync.every=2"),
        (
            {"rollout": RolloutConfig(sampling=SamplingConfig(top_p=0.9, top_k=20))},
            "nothing truncated, got temperature=1, top_p=0.9, top_k=20, min_p=0",
        ),
        (
            {"rollout": RolloutConfig(sampling=SamplingConfig(temperature=0.7))},
            "expected rollout.sampling with temperature=1 .*, got temperature=0.7",
        ),
    ],
)
def test_an_update_is_taken_back_only_where_engines_score_it(
    settings: dict[str, object], expected: str
) -> None:
    objective = ObjectiveConfig(acceptance=AcceptanceConfig(enabled=True))
    config = Config(objective=objective)
    rest = {"checkpoint": CheckpointConfig(every=8), "eval": EvalConfig(every=0)}
    with pytest.raises(ConfigError, match=rf"objective\.acceptance\.enabled: .*{expected}"):
        replace(config, **rest, **settings)
    replace(config, objective=ObjectiveConfig(), **rest, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sync": SyncConfig(running_requests="keep")}, "sync.running_requests: expected wait"),
        (
            {"rollout": RolloutConfig(max_policy_age=1), "sync": SyncConfig(every=2)},
            "sync.every: expected 1 with rollout.max_policy_age=1",
        ),
        (
            {
                "rollout": RolloutConfig(max_policy_age=1),
                "objective": ObjectiveConfig(acceptance=AcceptanceConfig(enabled=True)),
            },
            "objective.acceptance.enabled: expected false",
        ),
    ],
)
def test_rollouts_ahead_need_a_publication_in_every_step(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{"loop": LoopConfig(num_steps=20), "eval": EvalConfig(every=0), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay": "runs/old/rollouts"}, "expected zero in a replay, which has no engines to mea"),
        ({"sync": SyncConfig(probe_num_tokens=0)}, "expected zero with sync.probe_num_tokens=0"),
        (
            {"rollout": RolloutConfig(sampling=SamplingConfig(top_p=0.9))},
            "expected zero with a truncated rollout.sampling, .* with top_p=0.9",
        ),
        (
            {"learner": LearnerConfig(moe=MoeConfig(routing_replay="rollout"))},
            "expected zero with learner.moe.routing_replay=rollout",
        ),
    ],
)
def test_the_gap_of_fresh_weights_needs_the_parity_probe(
    changes: dict[str, Any], message: str
) -> None:
    constraint = ConstraintConfig(tolerance_above="fresh_gap")
    with pytest.raises(ConfigError, match=f"objective.constraint.tolerance_above: {message}"):
        Config(objective=ObjectiveConfig(constraint=constraint), **changes)
    disabled = replace(constraint, enabled=False)
    Config(objective=ObjectiveConfig(constraint=disabled), **changes)


def test_the_gap_of_weights_that_are_taken_back_is_not_measured() -> None:
    constraint = ConstraintConfig(tolerance_above="fresh_gap")
    acceptance = AcceptanceConfig(enabled=True)
    with pytest.raises(ConfigError, match=r"expected zero with objective\.acceptance\.enabled"):
        Config(objective=ObjectiveConfig(constraint=constraint, acceptance=acceptance))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"late_groups": "drop"}, "late_groups: expected wait with hand_out=in_order"),
        ({"seconds_per_request": 8.0}, "seconds_per_request: expected 0 unless"),
        ({"tokens_per_request": 8}, "tokens_per_request: expected 0 unless"),
        (
            {
                "tokens_per_request": 8,
                "max_policy_age": 1,
                "sampling": SamplingConfig(stop=["</answer>"]),
            },
            "tokens_per_request: expected 0 unless",
        ),
        ({"max_policy_age": -1}, "max_policy_age: expected at least 0"),
    ],
)
def test_settings_of_rollouts_ahead(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutConfig(**settings)
