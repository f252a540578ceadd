"""The parity probe without engines and without a model: one number stands for the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from megatron_rl.config import Config, ConstraintConfig, SamplingConfig, SyncConfig
from megatron_rl.config.choices import Measure
from megatron_rl.errors import EnginesLostError, SyncError
from megatron_rl.loop.parity import MAX_PROMPTS, MORE, PROMPTS, Findings, ParityProbe, given_tokens
from megatron_rl.records import Rollout, Sample
from tests.fakes.groups import make_group, make_rollout
from tests.fakes.learner import FakeLearner, FakeParallel
from tests.fakes.parity_world import ONE, STEP, TWO, World, WorldLearner

CONFIG = Config()


def probe_of(world: World, *, dtype: str = "float32", **sync: Any) -> ParityProbe:
    config = replace(CONFIG, sync=SyncConfig(**sync), rollout=replace(CONFIG.rollout, dtype=dtype))
    return ParityProbe(WorldLearner(world), world.link(), config)


@pytest.mark.parametrize(
    ("dtype", "rounding", "tolerance"),
    [("float32", 0.0, 0.0), ("bfloat16", 0.005, 0.0), ("bfloat16", 0.05, 0.1)],
)
def test_sound_updates_pass_and_a_stale_engine_of_one_update_does_not(
    dtype: str, rounding: float, tolerance: float
) -> None:
    """Also where the rounding is twice the change, as in INT4."""
    for last_sound in range(1, 20):
        world = World(ONE, TWO, rounding=rounding)
        probe = probe_of(world, dtype=dtype, probe_tolerance=tolerance)
        probe.check(0, "0")
        for version in range(1, last_sound):
            world.update()
            figures = probe.check(version, str(version))
            assert figures["sync/probe_is_telling/min"] == 1.0
        world.update(stale=[TWO])
        with pytest.raises(SyncError, match=f"^engine {TWO} after update {last_sound}: parity"):
            probe.check(last_sound, "new")


def test_the_figures_of_an_update() -> None:
    world = World()
    probe = probe_of(world)
    assert set(probe.check(0, "0")) == {  # nothing has changed yet
        "sync/probe_gap/mean",
        "sync/probe_gap/max",
        "sync/probe_gap/standard_error",
        "sync/probe_relative_logprob_gap/max",
        "sync/probe_tokens/min",
        "sync/fresh_gap/mean",
    }
    world.update()
    figures = probe.check(1, "1")
    assert figures["sync/probe_tokens/min"] == 48
    assert figures["sync/probe_gap/mean"] < 1e-7
    assert figures["sync/probe_change_ratio/min"] == pytest.approx(1.0)
    # d/dw of 0.5 sin(w + ...) times STEP, over all phases.
    assert figures["sync/probe_learner_change/rms"] == pytest.approx(
        0.5 * STEP / math.sqrt(2), rel=0.3
    )
    assert figures["sync/probe_engine_change/rms"] == pytest.approx(
        figures["sync/probe_learner_change/rms"]
    )


@pytest.mark.parametrize("measure", ["probability", "log_ratio"])
def test_the_gap_of_fresh_weights_is_that_of_all_engines_in_the_unit_of_the_constraint(
    measure: Measure,
) -> None:
    world = World(ONE, TWO)
    world.gaps = dict.fromkeys(range(1, 100, 2), 0.02)  # all of engine TWO
    objective = replace(CONFIG.objective, constraint=ConstraintConfig(measure=measure))
    rollout = replace(CONFIG.rollout, dtype="bfloat16")
    config = replace(CONFIG, objective=objective, rollout=rollout)
    figures = ParityProbe(WorldLearner(world), world.link(), config).check(0, "0")
    of_two = figures["sync/probe_gap/mean"] if measure == "probability" else 0.02
    assert figures["sync/fresh_gap/mean"] == pytest.approx(of_two / 2, rel=1e-5)


def test_a_resumed_probe_measures_what_the_other_one_would_have() -> None:
    """It begins with the publication that the stopped one ended with."""
    whole, resumed = World(length=1, rounding=0.005), World(length=1, rounding=0.005)
    for world in (whole, resumed):  # the further prompts have other lengths than the first ones
        world.lengths = dict.fromkeys(range(PROMPTS, 100), 3)
    probe = probe_of(whole, dtype="bfloat16")
    probe.check(0, "0")
    found = []
    for world, each in ((whole, probe), (resumed, probe_of(resumed, dtype="bfloat16"))):
        world.update()
        each.check(1, "1")
        world.update()
        world.asked.clear()
        figures = each.check(2, "2")
        found.append((figures["sync/fresh_gap/mean"], len(world.asked)))
    assert found[0] == found[1]


def test_an_update_that_changes_nothing_says_nothing() -> None:
    """A learning rate of 0, or one that the engines' precision does not show: the same bytes."""
    world = World()
    probe = probe_of(world, dtype="bfloat16")
    probe.check(0, "0")
    assert probe.check(1, "0")["sync/probe_is_telling/min"] == 0.0
    world.update(stale=[ONE], step=1e-3)
    assert probe.check(2, "0")["sync/probe_is_telling/min"] == 0.0
    world.update(stale=[ONE], step=1e-3)
    with pytest.raises(SyncError, match="serves the weights of an earlier update"):
        probe.check(3, "3")


def test_every_engine_samples_its_tokens_from_the_whole_distribution() -> None:
    world = World(ONE, TWO)
    sampling = SamplingConfig(top_p=0.9, top_k=20, min_p=0.1, stop=["x"], stop_token_ids=[5])
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, sampling=sampling))
    ParityProbe(WorldLearner(world), world.link(), config).check(0, "0")
    assert [prompt.index for prompt, _ in world.asked] == list(range(2 * PROMPTS))
    for _, request in world.asked:
        found = request.sampling
        assert (found.top_k, found.top_p, found.min_p) == (0, 1.0, 0.0)
        assert (found.stop, found.stop_token_ids) == ([], [])
        assert (request.num_samples, found.max_tokens) == (1, 6)  # 48 tokens of 8 samples


@pytest.mark.parametrize(("length", "num_prompts"), [(1, 48), (2, 24), (5, 10)])
def test_it_samples_until_it_has_its_tokens(length: int, num_prompts: int) -> None:
    """And asks for as many at once the next time, so that it costs one round."""
    world = World(ONE, TWO, length=length)
    probe = probe_of(world)
    assert probe.check(0, "0")["sync/probe_tokens/min"] >= 48
    assert [prompt.index for prompt, _ in world.asked] == list(range(2 * num_prompts))
    world.asked.clear()
    world.update()
    assert probe.check(1, "1")["sync/probe_tokens/min"] == num_prompts * length
    assert len(world.asked) == 2 * num_prompts
    world.length = 100
    probe.check(2, "2")
    world.asked.clear()
    probe.check(3, "3")
    assert len(world.asked) == 2 * PROMPTS


def test_it_gives_up_sampling_after_some_rounds() -> None:
    world = World(length=1)
    assert probe_of(world, probe_num_tokens=10_000).check(0, "0")
    assert len(world.asked) == PROMPTS + 3 * MAX_PROMPTS


def test_above_the_bound_by_chance_it_asks_again_and_passes() -> None:
    """One of eight samples is 0.25 off, the others are not: a mean of 0.02 > 0.015."""
    world = World(rounding=1e-4)
    world.gaps = {3: 0.5}
    figures = probe_of(world, dtype="bfloat16").check(0, "0")
    assert figures["sync/probe_tokens/min"] == 48 * (1 + MORE)
    assert 1e-4 < figures["sync/probe_gap/mean"] < 0.015
    assert figures["sync/fresh_gap/mean"] > 0.015  # of the tokens that every probe asks for
    assert len(world.asked) == PROMPTS * (1 + MORE)
    assert len({prompt.index for prompt, _ in world.asked}) == len(world.asked)


def test_above_the_bound_by_a_mistake_it_tells_so_in_standard_errors() -> None:
    world = World()
    world.gaps = dict.fromkeys(range(200), 0.2)
    with pytest.raises(SyncError, match=r"mean \|p - p\| of at most 0.015 .* standard errors abo"):
        probe_of(world, dtype="bfloat16").check(7, "7")


def test_in_float32_the_new_tokens_must_violate_the_condition_too() -> None:
    world = World()
    world.gaps = {3: 1e-4}
    assert probe_of(world).check(0, "0")["sync/probe_relative_logprob_gap/max"] > 2e-5
    world.gaps = {3: 1e-4, 20: 1e-4}
    with pytest.raises(SyncError, match=r"max \|d logprob\|"):
        probe_of(world).check(0, "0")


def test_a_log_prob_that_is_none_ends_the_run() -> None:
    world = World()
    world.gaps = {3: math.nan}
    with pytest.raises(SyncError, match="expected finite log-probs"):
        probe_of(world).check(0, "0")


def test_given_tokens_are_scored_at_temperature_1() -> None:
    world = World()
    probe = probe_of(world)
    probe.check(0, "0")
    assert probe._learner.temperatures == [1.0, None]


def test_given_tokens_leave_room_for_one_more() -> None:
    samples = [
        Sample(prompt_index=9, sample_index=0, rollout=each, reward=0.0, advantage=0.0)
        for each in make_group(9, make_rollout(4), make_rollout(0)).rollouts
    ]
    long, short = given_tokens(samples)
    assert long.rollout.token_ids.tolist() == [1, 5, 6, 6, 6]
    assert long.rollout.loss_mask.tolist() == [False, True, True, True, True]
    assert short.rollout.token_ids.tolist() == [1, 5]
    assert [each.prompt_index for each in (long, short)] == [0, 1]


def test_another_rank_does_what_the_first_one_found() -> None:
    """It asks no engine, takes part in every pass, and raises the same error."""
    doubtful = Findings(figures={}, complaint="", is_doubtful=True)
    wrong = Findings(figures={}, complaint="engine http://one is wrong", is_doubtful=True)
    answers = iter([(True, (ONE,)), False, doubtful, False, wrong])
    parallel = FakeParallel(rank=1, is_last_stage=False)
    parallel.from_first_rank = lambda value: next(answers)  # type: ignore[method-assign]
    learner = FakeLearner(parallel=parallel)
    with pytest.raises(SyncError, match=r"^engine http://one is wrong$"):
        ParityProbe(learner, None, CONFIG).check(3, "")
    assert learner.log == ["score_samples 0"] * 4
    assert list(answers) == []


def test_an_engine_that_is_lost_meanwhile_gives_no_figures() -> None:
    """The weights are then published again to the others, whose given tokens begin anew."""
    world = World(ONE, TWO)
    probe = probe_of(world)
    probe.check(0, "0")

    async def lose(*asked: Any) -> tuple[Rollout, ...]:
        world.pool.urls = (ONE,)
        return await World.rollouts(world, *asked)

    world.update()
    world.rollouts = lose  # type: ignore[method-assign]
    assert probe.check(1, "1") is None
    world.urls, world.rollouts = (ONE,), partial(World.rollouts, world)  # type: ignore
    figures = probe.check(1, "1")
    assert figures is not None and "sync/probe_change_ratio/min" not in figures
    world.update()
    assert "sync/probe_change_ratio/min" in probe.check(2, "2")
    world.pool.shortage_error = EnginesLostError("none is left")
    assert probe.check(2, "2") is None


def through_updates(world: World, probe: ParityProbe, num_updates: int = 4) -> None:
    """Sound updates pass."""
    probe.check(world.version, str(world.version))
    for _ in range(num_updates):
        world.update()
        assert probe.check(world.version, str(world.version)) is not None


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("float32", 0.0), ("bfloat16", 0.005), ("bfloat16", 0.03)]
)
@pytest.mark.parametrize(
    "odd",
    [
        {"length": 1},
        {"num_prompts": 1},
        {"num_prompts": 1, "length": 1, "prompt_length": 12},
        {"num_prompts": 3, "length": 1, "prompt_length": 12},
        {"prompt_length": 1, "length": 1},
    ],
    ids=str,
)
def test_odd_sets_of_prompts(odd: dict[str, int], dtype: str, rounding: float) -> None:
    """Responses that all end after one token, one prompt over and over, both: sound updates pass,
    and the first one that an engine misses is found.
    """
    world = World(ONE, TWO, rounding=rounding, **odd)
    probe = probe_of(world, dtype=dtype)
    through_updates(world, probe)
    world.update(stale=[TWO])
    with pytest.raises(SyncError, match=f"^engine {TWO} after update {world.version}: parity"):
        probe.check(world.version, str(world.version))


def test_one_prompt_that_is_rounded_badly_ends_no_run() -> None:
    """Its one token is off by 0.02 > 0.015 in every sample: one observation, however many there
    are. A gap that rounding does not make ends the run all the same.
    """
    world = World(num_prompts=1, length=1)
    world.gaps = dict.fromkeys(range(1000), 0.05)
    figures = probe_of(world, dtype="bfloat16").check(0, "0")
    assert figures is not None and figures["sync/probe_gap/mean"] > 0.015
    assert "sync/probe_gap/standard_error" not in figures
    world.gaps = dict.fromkeys(range(1000), 0.3)
    with pytest.raises(SyncError, match=r"mean \|p - p\| of at most 0.015 .*, got 0\.\d+ over 240"):
        probe_of(world, dtype="bfloat16").check(0, "0")


def test_a_set_whose_log_probs_are_all_0_tells_nothing() -> None:
    """A policy that has become deterministic: no update shows, and none is called stale."""
    for dtype in ("float32", "bfloat16"):
        world = World(ONE, TWO, is_sure=True)
        probe = probe_of(world, dtype=dtype)
        through_updates(world, probe, 3)
        world.update(stale=[TWO])
        figures = probe.check(world.version, "new")
        assert figures is not None and figures["sync/probe_is_telling/min"] == 0.0
        assert figures["sync/probe_gap/mean"] == 0.0


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1), ("bfloat16", 12)])
def test_an_engine_whose_updates_are_partially_applied(dtype: str, most: int) -> None:
    """In float32 it is found at once, in BF16 as soon as the missing part is larger than rounding,
    though its log-probs change with every update.
    """
    world = World(ONE, TWO, rounding=0.002 if dtype == "bfloat16" else 0.0)
    probe = probe_of(world, dtype=dtype)
    through_updates(world, probe, 3)
    with pytest.raises(SyncError, match=f"^engine {TWO} after update .*does not serve the publi"):
        for _ in range(most):
            world.update(partial=[TWO])
            probe.check(world.version, str(world.version))


def test_given_tokens_of_one_prompt_are_rotated() -> None:
    """So that none of them repeats another; those of other prompts are as they were."""
    own = make_group(9, *[make_rollout(3)] * 4)
    other = make_group(10, make_rollout(3))
    other_prompt = replace(other.rollouts[0], token_ids=(8, 9, 6, 6, 6))
    samples = [
        Sample(prompt_index=0, sample_index=0, rollout=each, reward=0.0, advantage=0.0)
        for each in (*own.rollouts[:2], other_prompt, *own.rollouts[2:])
    ]
    given = [each.rollout.token_ids.tolist() for each in given_tokens(samples)]
    assert given == [[1, 5, 6, 6], [5, 6, 6, 1], [8, 9, 6, 6], [6, 6, 1, 5], [6, 1, 5, 6]]
    routed = [
        replace(each, rollout=replace(each.rollout, routes=np.zeros((4, 1, 1)))) for each in samples
    ]
    assert [each.rollout.token_ids.tolist() for each in given_tokens(routed)][1] == [1, 5, 6, 6]
