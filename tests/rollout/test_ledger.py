"""Which prompts are used, and which of the others a replica takes."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from megatron_rl.rollout.ledger import Ledger, joined


def first(ledger: Ledger, replica: int, num_replicas: int, count: int) -> list[int]:
    return list(islice(ledger.unused(replica, num_replicas), count))


def test_replicas_share_the_unused_prompts() -> None:
    ledger = Ledger(first=3, ahead=(4, 7))
    assert first(ledger, 0, 1, 5) == [3, 5, 6, 8, 9]
    assert first(ledger, 0, 2, 3) == [3, 6, 9]
    assert first(ledger, 1, 2, 3) == [5, 8, 10]


def test_used_prompts_close_the_gap() -> None:
    ledger = Ledger(first=3, ahead=(4, 7)).with_used([6])
    assert ledger == Ledger(first=3, ahead=(4, 6, 7))
    assert ledger.with_used([5, 3]) == Ledger(first=8)


@pytest.mark.parametrize("indices", [[2], [4], [5, 5]])
def test_a_prompt_is_used_once(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="not used yet"):
        Ledger(first=3, ahead=(4,)).with_used(indices)


def test_any_number_of_replicas_uses_every_prompt_once() -> None:
    """Runs that stop at random, with another number of replicas each time."""
    chance = random.Random(0)
    ledger, used = Ledger(), []
    for _ in range(50):
        num_replicas = chance.randint(1, 4)
        parts = []
        for replica in range(num_replicas):
            begun = first(ledger, replica, num_replicas, chance.randint(0, 6))
            parts.append(chance.sample(begun, chance.randint(0, len(begun))))
        ledger = joined(ledger, parts)
        used += [index for part in parts for index in part]
    assert len(used) == len(set(used)) > 100
    assert sorted(used) == [*range(ledger.first), *ledger.ahead]
