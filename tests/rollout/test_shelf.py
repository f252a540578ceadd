"""Which prompts may be started, and which groups a step takes."""

from __future__ import annotations

import random

import pytest

from megatron_rl.config.choices import HandOut, LateGroups
from megatron_rl.records import ScoredGroup
from megatron_rl.rollout.shelf import Shelf
from tests.fakes.groups import make_group, make_rollout, make_scores

NUM_STEPS = 40


def make_shelf(
    *,
    max_age: int = 1,
    prompts_per_step: int = 2,
    num_steps: int = NUM_STEPS,
    hand_out: HandOut = "in_order",
    late_groups: LateGroups = "wait",
    last_step: int = 0,
) -> Shelf:
    return Shelf(
        max_age=max_age,
        prompts_per_step=prompts_per_step,
        num_steps=num_steps,
        hand_out=hand_out,
        late_groups=late_groups,
        last_step=last_step,
    )


def group(index: int, version: int) -> ScoredGroup:
    rollouts = [make_rollout(version=version + 1), make_rollout(version=version)]
    return ScoredGroup(group=make_group(index, *rollouts), scores=make_scores(1, 0))


def indices_of(groups: list[ScoredGroup]) -> list[int]:
    return [each.group.prompt.index for each in groups]


def test_room_grows_with_the_version_and_shrinks_with_what_is_on_the_shelf() -> None:
    shelf = make_shelf(max_age=1, prompts_per_step=2)
    assert shelf.num_to_start(0) == 4  # for steps 1 and 2
    for index in range(4):
        shelf.start(index, 0)
    assert shelf.num_to_start(0) == 0
    for index in range(2):
        shelf.finish(group(index, 0))
    assert shelf.num_to_start(0) == 0  # finished groups are bounded, too
    assert indices_of(shelf.take(1, 2)) == [0, 1]
    # Step 1 trains: the prompts of step 3 need weights of version 1.
    assert shelf.num_to_start(0) == 0
    assert shelf.num_to_start(1) == 2
    assert shelf.take_used() == [0, 1]
    assert shelf.take_used() == []


def test_nothing_is_started_for_steps_after_the_last_one() -> None:
    shelf = make_shelf(max_age=3, prompts_per_step=2, num_steps=2)
    assert shelf.num_to_start(0) == 4


def test_a_replica_without_a_share_starts_what_a_round_asks_for() -> None:
    shelf = make_shelf(prompts_per_step=0)
    assert shelf.num_to_start(0) == 0
    shelf.want(1, 1)
    assert shelf.num_to_start(0) == 1


def test_in_order_a_step_waits_for_its_own_prompts() -> None:
    shelf = make_shelf()
    for index in range(4):
        shelf.start(index, 0)
    for index in (3, 1, 2):
        shelf.finish(group(index, 0))
    assert not shelf.is_ready(1, 2)
    shelf.finish(group(0, 0))
    assert shelf.is_ready(1, 2)
    assert indices_of(shelf.take(1, 2)) == [0, 1]
    assert indices_of(shelf.finished()) == [3, 2] or indices_of(shelf.finished()) == [2, 3]


def test_finished_groups_go_first_unless_another_would_grow_too_old() -> None:
    shelf = make_shelf(hand_out="finished")
    for index in range(4):
        shelf.start(index, 0)
    for index in (3, 1):
        shelf.finish(group(index, 0))
    assert indices_of(shelf.take(1, 2)) == [1, 3]
    for index in (4, 5):
        shelf.start(index, 1)
        shelf.finish(group(index, 1))
    # Of age 1 in step 2, and too old for step 3: step 2 waits for both.
    assert shelf.want(2, 2) == []
    assert not shelf.is_ready(2, 2)
    shelf.finish(group(0, 0))
    assert not shelf.is_ready(2, 2)
    shelf.finish(group(2, 0))
    assert indices_of(shelf.take(2, 2)) == [0, 2]


def test_late_groups_are_dropped_once_the_step_has_others() -> None:
    shelf = make_shelf(hand_out="finished", late_groups="drop")
    for index in range(4):
        shelf.start(index, 0)
    for index in (3, 1):
        shelf.finish(group(index, 0))
    shelf.take(1, 2)
    for index in (4, 5):
        shelf.start(index, 1)
        shelf.finish(group(index, 1))
    assert indices_of(shelf.take(2, 2)) == [4, 5]
    assert shelf.want(3, 2) == [0, 2]
    shelf.finish(group(0, 0))  # comes after it was dropped
    assert shelf.finished() == []
    assert shelf.take_used() == [1, 3, 4, 5, 0, 2]


@pytest.mark.parametrize("hand_out", ["in_order", "finished"])
@pytest.mark.parametrize("max_age", [1, 2, 4])
def test_no_group_grows_too_old_however_long_it_takes(hand_out: HandOut, max_age: int) -> None:
    """Without a drop, in random runs; and the number on the shelf stays bounded."""
    chance = random.Random(max_age)
    shelf = make_shelf(max_age=max_age, prompts_per_step=3, hand_out=hand_out)
    next_index, started, used = 0, {}, []
    for step in range(1, NUM_STEPS + 1):
        assert shelf.want(step, 3) == []
        while not shelf.is_ready(step, 3):
            for _ in range(shelf.num_to_start(step - 1)):
                shelf.start(next_index, step - 1)
                started[next_index] = step - 1
                next_index += 1
            assert len(started) <= (max_age + 1) * 3
            late = chance.choice(shelf.unfinished())
            shelf.finish(group(late, started[late]))
        taken = indices_of(shelf.take(step, 3))
        assert all(step - 1 - started.pop(index) <= max_age for index in taken)
        used += taken
        while chance.random() < 0.7 and shelf.unfinished():  # while the learner trains
            late = chance.choice(shelf.unfinished())
            shelf.finish(group(late, started[late]))
    assert sorted(used) == list(range(next_index)) == list(range(3 * NUM_STEPS))
