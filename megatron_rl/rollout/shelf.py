"""The groups of one replica that are being sampled, or are finished and not handed out yet: which
prompts may be started, and which groups a step takes. No threads, no clock, no engine.

The age of a token in step t is t - 1 less the version of the weights that sampled it. A group is
started under version v only while the groups on the shelf fit into the steps up to v + 1 + k, the
last one that may use it: with P groups a step, and s the last step that took its groups,

    groups on the shelf  <=  (min(v + 1 + k, num_steps) - s) * P

So the steps to come can take every group before it is too old, and the number of prompts in flight
is bounded. (The admission rule is that of AReaL, arXiv 2505.24298.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rl.config.choices import HandOut, LateGroups
from megatron_rl.records import ScoredGroup


@dataclass(slots=True, kw_only=True)
class _Place:
    """A group on the shelf."""

    version: int  # no token of it is older
    scored: ScoredGroup | None = None  # None: it is not finished
    rank: int = -1  # in the order in which groups were finished


class Shelf:
    """
    Args:
        max_age: k.
        prompts_per_step: P, of this replica.
        num_steps: of the run; nothing is sampled for later ones.
        last_step: the step before the first one that takes groups.
    """

    def __init__(
        self,
        *,
        max_age: int,
        prompts_per_step: int,
        num_steps: int,
        hand_out: HandOut,
        late_groups: LateGroups,
        last_step: int = 0,
    ) -> None:
        self._max_age = max_age
        self._prompts_per_step = prompts_per_step
        self._num_steps = num_steps
        self._hand_out = hand_out
        self._late_groups = late_groups
        self._last_step = last_step
        self._wanted = 0  # groups that the step which waits now takes
        self._num_finished = 0
        self._places: dict[int, _Place] = {}  # by prompt, in the order in which they were started
        self._used: list[int] = []

    def finished(self) -> list[ScoredGroup]:
        """The groups that are finished and were not handed out."""
        return [each.scored for each in self._places.values() if each.scored is not None]

    def unfinished(self) -> list[int]:
        """The prompts in flight."""
        return [index for index, each in self._places.items() if each.scored is None]

    def take_used(self) -> list[int]:
        """The prompts that were handed out or dropped since the last call, in that order."""
        used, self._used = self._used, []
        return used

    def num_to_start(self, version: int) -> int:
        """How many prompts may be started now, while the engines serve `version`."""
        num_steps = min(version + 1 + self._max_age, self._num_steps) - self._last_step
        room = max(num_steps * self._prompts_per_step, self._wanted)
        return max(0, room - len(self._places))

    def start(self, index: int, version: int) -> None:
        """A prompt is being sampled; the engines serve `version` or newer weights."""
        self._places[index] = _Place(version=version)

    def finish(self, scored: ScoredGroup) -> None:
        """A group is finished. One that was dropped in the meantime is ignored."""
        index = scored.group.prompt.index
        if index not in self._places:
            return
        oldest = oldest_version(scored, default=self._places[index].version)
        self._places[index] = _Place(version=oldest, scored=scored, rank=self._num_finished)
        self._num_finished += 1

    def want(self, step: int, count: int) -> list[int]:
        """`step` waits for `count` groups. Returns the prompts of groups that are too old for it:
        they are dropped, and if they are in flight, their requests may be ended.
        """
        self._wanted = count
        late = [index for index in self._places if self._last_step_of(index) < step]
        self._remove(late)
        return late

    def is_ready(self, step: int, count: int) -> bool:
        """Whether the step can take `count` groups now."""
        chosen = self._chosen(step, count)
        return len(chosen) == count and all(self._places[each].scored for each in chosen)

    def take(self, step: int, count: int) -> list[ScoredGroup]:
        """Hand out the step's groups, by prompt; only if `is_ready`."""
        chosen = sorted(self._chosen(step, count))
        groups = [self._places[index].scored for index in chosen]
        assert all(groups), "take: expected finished groups"
        self._remove(chosen)
        self._last_step, self._wanted = step, 0
        return groups

    def _chosen(self, step: int, count: int) -> list[int]:
        """The prompts that the step takes or waits for, at most `count`.

        Those that are finished first may all be young. So that the others do not grow too old, a
        step takes, for every later step, as many of the groups that are due by then as the steps
        between cannot take.
        """
        if self._hand_out == "in_order":
            return list(self._places)[:count]
        finished = sorted(
            (index for index, each in self._places.items() if each.scored),
            key=lambda index: self._places[index].rank,
        )
        candidates = finished
        if self._late_groups == "wait":
            candidates = [*finished, *self.unfinished()]
        chosen: list[int] = []
        for last in range(step, step + self._max_age + 1):
            due = [index for index in self._places if self._last_step_of(index) <= last]
            num_needed = len(due) - (last - step) * self._prompts_per_step - len(chosen)
            due_first = [each for each in candidates if each in due and each not in chosen]
            chosen += due_first[: max(0, num_needed)]
        return list(dict.fromkeys([*chosen, *finished]))[:count]

    def _last_step_of(self, index: int) -> int:
        """The last step that may use the group."""
        return self._places[index].version + 1 + self._max_age

    def _remove(self, indices: Iterable[int]) -> None:
        for index in indices:
            del self._places[index]
            self._used.append(index)


def oldest_version(scored: ScoredGroup, *, default: int) -> int:
    """The version of the group's oldest sampled token; `default` if it has no such token."""
    versions = [
        int(each.weight_versions[each.loss_mask].min())
        for each in scored.group.rollouts
        if each.num_response_tokens
    ]
    return min(versions, default=default)
