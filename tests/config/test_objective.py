"""Presets, and the combinations of the objective that make no sense."""

from dataclasses import replace

import pytest

from megatron_rl.config import (
    Config,
    ConstraintConfig,
    ImportanceConfig,
    KLConfig,
    LearnerConfig,
    ObjectiveConfig,
    RejectionConfig,
    ScoreCenteringConfig,
)
from megatron_rl.config.choices import SQUARED_PENALTIES
from megatron_rl.config.file import load_config, save_config
from megatron_rl.config.presets import PRESETS
from megatron_rl.errors import ConfigError

CENTERED = ScoreCenteringConfig(enabled=True)


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("")
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_more_than_its_name_and_is_read_back(name, empty, tmp_path):
    config = load_config(empty, [f"objective.preset={name}"])
    assert config.objective.preset == name
    # dc_grpo is the defaults, said by name.
    assert (replace(config.objective, preset="") == ObjectiveConfig()) == (name == "dc_grpo")
    assert config.objective.constraint.enabled == name.startswith(("dc_", "dual_"))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_what_the_file_and_the_command_line_give_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("objective: {preset: icepop, importance: {upper: 4}}")
    objective = load_config(path).objective
    assert objective.importance == ImportanceConfig(level="token", mode="mask", lower=0.5, upper=4)
    objective = load_config(path, ["objective.importance.lower=0.25"]).objective
    assert (objective.importance.lower, objective.importance.upper) == (0.25, 4.0)
    objective = load_config(path, ["objective.preset=gspo"]).objective
    assert load_config(path, ["objective={preset: gspo}"]).objective == objective
    assert objective.policy_loss == "gspo"
    assert objective.importance == ImportanceConfig(upper=4.0)  # the file's, under gspo's nothing
    assert load_config(path, ["objective.preset="]).objective.importance.level == "none"


def test_the_published_numbers(empty):
    def of(name):
        return load_config(empty, [f"objective.preset={name}"]).objective

    assert (of("dapo").clip_low, of("dapo").clip_high, of("dapo").normalize) == (
        0.2,
        0.28,
        "token_mean",
    )
    assert load_config(empty, ["objective.preset=dapo"]).loop.dynamic_sampling.enabled
    assert (of("gspo").clip_low, of("gspo").clip_high) == (3e-4, 4e-4)
    assert of("tis").importance == ImportanceConfig(level="token", mode="truncate", upper=2.0)
    assert of("sequence_mask").importance.upper == 3.0
    cis = of("cis").importance
    assert (cis.level, cis.mode, cis.cis_slope, cis.cis_floor) == ("token", "cis", 2.3, 5e-3)
    geometric = of("geometric_rejection").rejection
    assert (geometric.lower, geometric.upper, geometric.veto_ratio) == (0.999, 1.001, 1e-4)
    assert of("k3_rejection").rejection.upper == 0.01


def test_the_penalties_of_the_papers_theory_have_presets(empty):
    for penalty in SQUARED_PENALTIES:
        constraint = load_config(
            empty, [f"objective.preset=dc_grpo_{penalty}"]
        ).objective.constraint
        assert constraint == ConstraintConfig(penalty=penalty)


def test_dr_grpo_divides_by_the_longest_response(empty):
    overrides = ["objective.preset=dr_grpo", "rollout.sampling.max_tokens=77"]
    objective = load_config(empty, overrides).objective
    assert (objective.normalize, objective.normalize_length) == ("constant", 77)
    assert objective.advantage_std == "none"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["preset=grop"], "objective.preset: expected grpo, dapo"),
        (["preset=3"], "objective.preset: expected grpo, dapo"),
        (["preset=bypass", "importance.level=token"], "importance.level: expected none with old_"),
        (["old_policy=rollout", "constraint.gate=mean"], "constraint.gate: expected batch or tok"),
        (["preset=gspo", "importance.level=token"], "importance.level: expected sequence_mean or"),
        (["preset=gspo", "rejection.divergence=k1"], "rejection.level: expected one of a seque"),
        (["importance.batch_normalize=true"], "batch_normalize: expected a level other than none"),
        (["importance.lower=1.5"], "importance.lower: expected a ratio in [0, 1], got 1.5"),
        (["importance.upper=0.9"], "importance.upper: expected a ratio of at least 1, got 0.9"),
        (["preset=cis", "importance.level=none"], "importance.level: expected token with mode=cis"),
        (
            ["preset=cis", "importance.upper=4"],
            "importance.upper: expected its default of 2 with m",
        ),
        (["preset=cis", "importance.lower=0.5"], "importance.lower: expected its default of 0 wit"),
        (["importance.cis_floor=2"], "importance.cis_floor: expected at most 1, got 2"),
        (["importance.cis_slope=-1"], "importance.cis_slope: expected at least 0, got -1"),
        (["importance.level=sequence"], "expected none, token, sequence_sum or sequence_mean, got"),
        (["rejection.divergence=k2", "rejection.lower=0.1"], "rejection.lower: expected 0 with"),
        (["rejection.divergence=k1", "rejection.upper=0.01"], "rejection.upper: expected a ratio"),
        (["rejection.veto_ratio=1"], "rejection.veto_ratio: expected in [0, 1), got 1"),
        (["rejection.opsm_threshold=-1"], "rejection.opsm_threshold: expected at least 0, got -1"),
        (["kl.coefficient=0.1"], "kl.reference: expected a checkpoint folder with coefficient=0.1"),
        (["kl.estimator=k4"], "kl.estimator: expected k1, k2 or k3, got 'k4'"),
        (["normalize=constant"], "normalize_length: expected at least 1 with normalize=constant"),
        (["normalize_length=8"], "normalize_length: expected at least 1 with normalize=constant"),
        (["clip_low=1"], "clip_low: expected in [0, 1), got 1"),
        (["preset=cispo", "clip_low=1.1"], "clip_low: expected in [0, 1], got 1.1"),
        (["dual_clip=1"], "dual_clip: expected 0, or above 1 with a policy_loss that takes PPO's"),
        (["preset=cispo", "dual_clip=3"], "minimum, got 3 with policy_loss=cispo"),
        (["ratio_cap=often"], "ratio_cap: expected a number or auto, got 'often'"),
        (["ratio_cap=1.2"], "ratio_cap: expected auto, 0 or at least 1.24, the largest ratio that"),
        (
            ["preset=dppo_tv", "ratio_cap=0.9"],
            "ratio_cap: expected auto, 0 or at least 1, the larg",
        ),
        (
            ["preset=cispo", "ratio_cap=9"],
            "ratio_cap: expected auto or 0 with policy_loss=cispo or",
        ),
        (
            ["dual_clip=3", "ratio_cap=20"],
            "ratio_cap: expected auto or 0 with policy_loss=cispo or",
        ),
        (["constraint.tolerance=often"], "constraint.tolerance: expected a number or auto, got"),
        (["constraint.tolerance=2"], "tolerance: expected a difference of probabilities in [0, 1]"),
        (
            ["preset=dc_grpo_age_penalty", "constraint.tolerance=auto"],
            "constraint.tolerance: expected a number with tolerance_above=fresh_gap, got auto",
        ),
        (["constraint.tolerance_above=age"], "tolerance_above: expected zero or fresh_gap, got"),
        (["constraint.tolerance_steps=1"], "constraint.tolerance_steps: expected at least 2, got"),
        (
            ["constraint.warn_after_steps=3"],
            "warn_after_steps: expected 0 (never) or at least 4, g",
        ),
        (
            ["constraint.tolerance_factor=0.8"],
            "tolerance_factor: expected it with tolerance=auto only, got 0.8 with tolerance=0.0037",
        ),
        (
            ["constraint.reference_tolerance=0.0037"],
            "reference_tolerance: expected it with tolerance=auto only, got 0.0037",
        ),
        (
            ["constraint.tolerance=auto", "constraint.reference_tolerance=0"],
            "constraint.reference_tolerance: expected above 0",
        ),
        (["constraint.gate=sequence"], "constraint.gate: expected batch, mean or token, got"),
        (["constraint.baseline=mean"], "constraint.baseline: expected none or batch, got 'mean'"),
        (
            ["preset=dc_grpo_penalty", "constraint.baseline=batch"],
            "constraint.baseline: expected none with penalty=differentiable",
        ),
        (
            ["preset=dc_grpo_centered", "old_policy=rollout"],
            "constraint.baseline: expected none with old_policy=rollout",
        ),
        (
            ["constraint.penalty=soft"],
            "constraint.penalty: expected shaping, differentiable, squar",
        ),
        (["constraint.measure=kl"], "constraint.measure: expected probability, ratio or log_ratio"),
        (
            ["constraint.measure=ratio", "constraint.tolerance=-1"],
            "tolerance: expected a finite number of at least 0, in the unit of measure=ratio, got",
        ),
        (["constraint.measure=ratio", "constraint.tolerance=.inf"], "expected a finite number"),
        (
            ["preset=dc_grpo_squared_ratio", "constraint.gate=token"],
            "constraint.gate: expected batch or mean with penalty=squared_ratio, which estimates a",
        ),
        (
            ["preset=dc_grpo_squared_difference", "constraint.max_discrepancy=0.1"],
            "constraint.max_discrepancy: expected null with penalty=squared_difference, which esti",
        ),
        (
            ["preset=dc_grpo_squared_log_ratio", "constraint.baseline=batch"],
            "constraint.baseline: expected none with penalty=squared_log_ratio, whose gradient a",
        ),
        (
            ["preset=dc_grpo_penalty", "constraint.measure=ratio", "constraint.gate=token"],
            "constraint.gate: expected batch or mean with penalty=differentiable, a difference of",
        ),
        (
            ["preset=dc_grpo_penalty", "constraint.measure=ratio", "constraint.max_discrepancy=2"],
            "constraint.max_discrepancy: expected at most 1, got 2",
        ),
        (
            ["constraint.max_penalty_share=0"],
            "constraint.max_penalty_share: expected above 0, got 0",
        ),
        (["constraint.max_discrepancy=2"], "constraint.max_discrepancy: expected at most 1, got 2"),
        (["constraint.max_discrepancy=0"], "constraint.max_discrepancy: expected above 0, got 0"),
        (
            ["score_centering.num_logprobs=0"],
            "score_centering.num_logprobs: expected at least 1,",
        ),
        (
            ["preset=gspo", "score_centering.enabled=true"],
            "objective.policy_loss: expected the loss of a token with score_centering.enabled, whi",
        ),
        (
            ["preset=sequence_tis", "score_centering.enabled=true"],
            "importance.level: expected none or token with score_centering.enabled, which needs th",
        ),
        (
            ["preset=score_centering", "rejection.divergence=k1"],
            "rejection.level: expected one of a sequence with score_centering.enabled, which need",
        ),
        (
            ["preset=dppo_tv", "score_centering.enabled=true"],
            "old_policy: expected recomputed with score_centering.enabled, because the score has m",
        ),
        (["entropy_coefficient=-1"], "entropy_coefficient: expected at least 0, got -1"),
    ],
)
def test_what_makes_no_sense_is_one_line(overrides, expected, empty):
    with pytest.raises(ConfigError) as caught:
        load_config(empty, [f"objective.{each}" for each in overrides])
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 0),
        ({"policy_loss": "dppo_tv"}, 20),
        ({"old_policy": "rollout"}, 20),
        ({"old_policy": "rollout", "ratio_cap": 5.0}, 5),
        ({"old_policy": "rollout", "ratio_cap": 0.0}, 0),
        ({"old_policy": "rollout", "dual_clip": 3.0}, 0),
        ({"old_policy": "rollout", "policy_loss": "cispo"}, 0),
        ({"ratio_cap": 20.0}, 20),
    ],
)
def test_the_ratio_is_capped_where_nothing_else_bounds_it(settings, bound):
    assert ObjectiveConfig(**settings).ratio_bound == bound


def test_opsm_needs_no_second_mini_batch():
    objective = ObjectiveConfig(rejection=RejectionConfig(opsm_threshold=1e-4))
    Config(objective=objective, learner=LearnerConfig(mini_batches_per_step=1))


def test_sound_combinations():
    for settings in (
        {"constraint": ConstraintConfig(penalty="differentiable", gate="token")},
        {"old_policy": "rollout", "constraint": ConstraintConfig(gate="token", tolerance="auto")},
        {"old_policy": "rollout", "rejection": RejectionConfig(divergence="k3", upper=0.1)},
        {"policy_loss": "gspo", "importance": ImportanceConfig(level="sequence_mean")},
        {"kl": KLConfig(reference="models/base")},  # measured only
        {
            "constraint": ConstraintConfig(
                measure="ratio", tolerance=1.5, gate="token", max_discrepancy=4.0
            )
        },
        {"constraint": ConstraintConfig(measure="log_ratio", penalty="squared_log_ratio")},
        {"constraint": ConstraintConfig(penalty="squared_difference", gate="mean")},
        {
            "score_centering": CENTERED,
            "importance": ImportanceConfig(level="token", mode="cis", batch_normalize=True),
            "rejection": RejectionConfig(divergence="k3", level="sequence_max", upper=0.1),
        },
        {"score_centering": CENTERED, "policy_loss": "cispo"},
    ):
        ObjectiveConfig(**settings)
