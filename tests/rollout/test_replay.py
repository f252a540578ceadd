"""Recorded steps handed out again, and refused where they are not what the step asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rl.config import DynamicSamplingConfig, LoopConfig
from megatron_rl.errors import DataError
from megatron_rl.records import JudgedGroup, ScoredGroup
from megatron_rl.rollout.recording import write_step
from megatron_rl.rollout.replay import ReplaySource
from megatron_rl.rollout.source import RolloutRequest, RolloutSource
from tests.rollout.groups import make_group, with_heads

REQUEST = RolloutRequest(step=2, first_prompt=4, num_prompts=4, weight_version=1)


def record(folder: Path, *of_ranks: Sequence[JudgedGroup]) -> None:
    for rank, groups in enumerate(of_ranks):
        write_step(folder, REQUEST.step, rank, groups, num_ranks=len(of_ranks))


def source(
    folder: Path,
    *,
    start: int = 0,
    stop: int | None = None,
    is_dynamic: bool = False,
    num_logprobs: int = 0,
    is_any_order: bool = False,
) -> RolloutSource:
    """The share is all items from `start` to `stop`."""
    config = LoopConfig(
        prompts_per_step=4,
        samples_per_prompt=3,
        dynamic_sampling=DynamicSamplingConfig(enabled=is_dynamic),
    )

    def share(count: int) -> tuple[int, int]:
        return start, (count if stop is None else stop) - start

    return ReplaySource(
        folder, config, share=share, num_logprobs=num_logprobs, is_any_order=is_any_order
    )


def scored(index: int) -> ScoredGroup:
    judged = make_group(index)
    return ScoredGroup(group=judged.group, scores=judged.scores)


def test_what_was_recorded_comes_back_exactly(tmp_path: Path) -> None:
    record(tmp_path, [make_group(6), make_group(4)], [make_group(7), make_group(5)])
    taken = source(tmp_path).take(REQUEST)
    assert taken.groups == tuple(scored(index) for index in range(4, 8))
    assert (taken.num_prompts, taken.num_rounds) == (4, 0)


def test_heads_are_replayed_if_the_objective_needs_them(tmp_path: Path) -> None:
    groups = [with_heads(make_group(index), 5) for index in range(4, 8)]
    record(tmp_path, groups)
    taken = source(tmp_path, num_logprobs=5).take(REQUEST)
    assert [each.group for each in taken.groups] == [each.group for each in groups]
    assert source(tmp_path).take(REQUEST).groups == tuple(scored(index) for index in range(4, 8))
    expected = rf"replay={tmp_path}, prompt 4: expected a head of 6 log-probs .* got 5 for each of"
    with pytest.raises(DataError, match=expected):
        source(tmp_path, num_logprobs=6).take(REQUEST)
    record(tmp_path, [make_group(index) for index in range(4, 8)])
    with pytest.raises(DataError, match=r"a head of 5 log-probs \(objective.score_.*, got none"):
        source(tmp_path, num_logprobs=5).take(REQUEST)


def test_a_run_that_sampled_ahead_may_have_used_prompts_in_another_order(tmp_path: Path) -> None:
    record(tmp_path, [make_group(index) for index in (4, 6, 9, 11)])
    with pytest.raises(DataError, match="from prompt 4 on"):
        source(tmp_path).take(REQUEST)
    taken = source(tmp_path, is_any_order=True).take(REQUEST)
    assert taken.groups == tuple(scored(index) for index in (4, 6, 9, 11))
    record(tmp_path, [make_group(index) for index in (4, 6, 9)])
    with pytest.raises(DataError, match="got 3 from prompt 4"):
        source(tmp_path, is_any_order=True).take(REQUEST)


def test_each_replica_gets_its_share(tmp_path: Path) -> None:
    record(tmp_path, [make_group(index) for index in range(4, 8)])
    taken = source(tmp_path, start=1, stop=3).take(REQUEST)
    assert taken.groups == (scored(5), scored(6))
    assert taken.num_prompts == 4


def test_dynamic_sampling_may_have_recorded_more(tmp_path: Path) -> None:
    record(tmp_path, [make_group(index) for index in range(4, 10)])
    taken = source(tmp_path, is_dynamic=True).take(REQUEST)
    assert [each.group.prompt.index for each in taken.groups] == list(range(4, 10))
    assert taken.num_prompts == 6


@pytest.mark.parametrize(
    ("groups", "is_dynamic", "got"),
    [
        ([], False, "got 0 from prompt none on with 0"),
        ([4, 5, 6], False, "got 3 from prompt 4 on with 3"),
        ([4, 5, 6], True, "got 3 from prompt 4 on with 3"),
        ([4, 5, 6, 7, 8], False, "got 5 from prompt 4 on with 3"),
        ([5, 6, 7, 8], False, "got 4 from prompt 5 on with 3"),
        ([4, 5, 7, 8], True, "got 4 from prompt 4 on with 3"),
    ],
    ids=["nothing", "too few", "too few, dynamic", "too many", "other prompts", "a gap"],
)
def test_another_batch_is_refused(
    tmp_path: Path, groups: list[int], is_dynamic: bool, got: str
) -> None:
    record(tmp_path, [make_group(index) for index in groups])
    expected = (
        f"replay={tmp_path}: expected step 2 to hold 4 prompts {'or more ' * is_dynamic}from "
        "prompt 4 on with 3 samples each (loop.prompts_per_step, loop.samples_per_prompt, "
        f"loop.dynamic_sampling), {got}"
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        source(tmp_path, is_dynamic=is_dynamic).take(REQUEST)


@pytest.mark.parametrize("odd", [0, 3])
def test_another_group_size_is_refused(tmp_path: Path, odd: int) -> None:
    """Of one group alone, too."""
    record(tmp_path, [make_group(4 + n, 2 if n == odd else 3) for n in range(4)])
    with pytest.raises(DataError, match=rf"got 4 from prompt 4 on with {2 if odd == 0 else 3}$"):
        source(tmp_path).take(REQUEST)


def test_a_step_that_was_not_recorded_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step_000002\.rank0\.safetensors: expected"):
        source(tmp_path).take(REQUEST)
