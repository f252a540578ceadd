"""Objects between real ranks: nothing lost, nothing twice, in order."""

from __future__ import annotations

from torch import distributed

from megatron_rl.learner.layout.exchange import exchange, gather_from_all
from tests.support.distributed import run_ranks

WORLD_SIZE = 3


def _exchange(rank: int) -> list[list[object]]:
    group = distributed.group.WORLD
    # Rank r packs r + q items for rank q: rank 0 has nothing for itself.
    items_for = [
        [(rank, other, number) for number in range(rank + other)] for other in range(WORLD_SIZE)
    ]
    nothing = exchange([[] for _ in range(WORLD_SIZE)], group)
    text = exchange([["ä" * 10_000 * rank]] * WORLD_SIZE, group)
    return [exchange(items_for, group), nothing, text]


def test_every_rank_gets_what_was_packed_for_it() -> None:
    for rank, (received, nothing, text) in enumerate(run_ranks(_exchange, WORLD_SIZE)):
        assert received == [
            (source, rank, number)
            for source in range(WORLD_SIZE)
            for number in range(source + rank)
        ]
        assert nothing == []
        assert [len(each) for each in text] == [0, 10_000, 20_000]


def _gather(rank: int) -> list[object]:
    return gather_from_all({"rank": rank, "lengths": list(range(rank))}, distributed.group.WORLD)


def test_all_values_in_order_of_ranks() -> None:
    expected = [{"rank": rank, "lengths": list(range(rank))} for rank in range(WORLD_SIZE)]
    assert run_ranks(_gather, WORLD_SIZE) == [expected] * WORLD_SIZE
