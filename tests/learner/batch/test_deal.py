"""Samples dealt among real ranks: each lands in one row of one replica, in its mini-batch."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from megatron_rl.config import ParallelConfig
from megatron_rl.learner.batch.deal import by_sample, deal_batch
from megatron_rl.learner.layout.host_groups import HostGroups
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.records import MicroBatch, RecomputedRow, Rollout, RolloutHead, Sample
from tests.support.distributed import run_ranks

NUM_PROMPTS, NUM_SAMPLES, TOKENS_PER_ROW = 6, 3, 40
FIRST_PROMPT = 12


def make_sample(prompt: int, index: int, *, is_kept: bool = True) -> Sample:
    rng = random.Random(100 * prompt + index)
    length = rng.randint(1, TOKENS_PER_ROW)
    num_prompt = rng.randint(1, length)
    kept = tuple(position >= num_prompt for position in range(length))
    head = np.random.default_rng(100 * prompt + index).random((sum(kept), 3), dtype=np.float32)
    return Sample(
        prompt_index=FIRST_PROMPT + prompt,
        sample_index=index,
        rollout=Rollout(
            token_ids=tuple(rng.randint(3, 97) for _ in range(length)),
            loss_mask=kept,
            rollout_logprobs=tuple(-rng.random() if each else 0.0 for each in kept),
            weight_versions=tuple(4 if each else -1 for each in kept),
            finish_reason="stop",
            text="",
            head=RolloutHead(token_ids=(9 * head).astype(np.int32), logprobs=-head)
            if len(head)
            else None,
        ),
        reward=rng.random(),
        advantage=rng.gauss(0.0, 1.0),
        is_kept=is_kept,
    )


KEYS = [(prompt, index) for prompt in range(NUM_PROMPTS) for index in range(NUM_SAMPLES)]
ALL = [make_sample(*key) for key in KEYS]
# Prompts 1 and 2 were dropped, and one response of prompt 3.
DROPPED = {*((prompt, index) for prompt in (1, 2) for index in range(NUM_SAMPLES)), (3, 1)}
PARTLY_KEPT = [make_sample(*key, is_kept=key not in DROPPED) for key in KEYS]


def gloo_parallel(rank: int, world_size: int, model_size: int) -> Parallel:
    """Plain groups of so many ranks a replica; TP is the whole of a replica."""
    replicas = [
        list(range(first, first + model_size)) for first in range(0, world_size, model_size)
    ]
    model_groups = [distributed.new_group(ranks) for ranks in replicas]
    dp_groups = [distributed.new_group(list(ranks)) for ranks in zip(*replicas)]
    model_group, alone = model_groups[rank // model_size], None
    for number in range(world_size):
        group = distributed.new_group([number])
        alone = group if number == rank else alone
    dp_group = dp_groups[rank % model_size]
    return Parallel(
        layout=ParallelConfig(),
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        tp_group=model_group,
        pp_group=alone,
        dp_group=dp_group,
        cp_group=alone,
        ep_group=alone,
        etp_group=alone,
        edp_group=distributed.group.WORLD,
        model_group=model_group,
        host=HostGroups(model=model_group, pp=alone, dp=dp_group, world=distributed.group.WORLD),
    )


def _deal(
    rank: int, world_size: int, model_size: int, num_mini_batches: int, samples: list[Sample] = ALL
) -> dict[str, Any]:
    parallel = gloo_parallel(rank, world_size, model_size)
    first = NUM_PROMPTS * parallel.dp_rank // parallel.dp_size
    last = NUM_PROMPTS * (parallel.dp_rank + 1) // parallel.dp_size
    mine = samples[first * NUM_SAMPLES : last * NUM_SAMPLES] if parallel.is_replica_head else []
    batch = deal_batch(
        mine,
        parallel,
        samples_per_prompt=NUM_SAMPLES,
        num_mini_batches=num_mini_batches,
        tokens_per_row=TOKENS_PER_ROW,
    )
    # Each position's own token in the place of a log-prob: what comes back must be the tokens.
    recomputed = [
        RecomputedRow(
            micro_batch=row,
            recomputed_logprobs=row.labels.float(),
            is_outside_support=torch.zeros_like(row.loss_mask),
        )
        for rows in (*batch.mini_batches, batch.dropped)
        for row in rows
    ]
    return {
        "samples": [samples_of(rows) for rows in batch.mini_batches],
        "dropped": samples_of(batch.dropped),
        "num_left_out": batch.num_left_out,
        "num_dropped_rows": len(batch.dropped),
        "num_rows": [len(rows) for rows in batch.mini_batches],
        "num_kept": [int(sum(row.loss_mask.sum() for row in rows)) for rows in batch.mini_batches],
        "returned": by_sample(recomputed),
    }


def samples_of(rows: tuple[MicroBatch, ...]) -> list[Sample]:
    return [sample for row in rows for sample in row.samples]


@pytest.mark.parametrize(
    ("world_size", "model_size", "num_mini_batches"), [(1, 1, 2), (2, 1, 1), (2, 2, 2), (4, 2, 3)]
)
def test_every_sample_is_dealt_once(
    world_size: int, model_size: int, num_mini_batches: int
) -> None:
    of_ranks = run_ranks(_deal, world_size, world_size, model_size, num_mini_batches)
    heads = of_ranks[::model_size]
    dealt = [sample for each in heads for mini_batch in each["samples"] for sample in mini_batch]
    key = lambda sample: (sample.prompt_index, sample.sample_index)  # noqa: E731
    assert sorted(dealt, key=key) == ALL  # each once, and unchanged
    for rank, each in enumerate(of_ranks):
        assert each["samples"] == of_ranks[rank // model_size * model_size]["samples"]
        assert each["num_rows"] == of_ranks[0]["num_rows"]
    num_kept = sum(sum(each["num_kept"]) for each in heads)
    assert num_kept == sum(sample.rollout.num_response_tokens for sample in ALL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_mini_batches_are_the_same_on_any_number_of_ranks(world_size: int) -> None:
    of_ranks = run_ranks(_deal, world_size, world_size, 1, 3)
    for number in range(3):
        keys = Counter(
            (sample.prompt_index, sample.sample_index)
            for each in of_ranks
            for sample in each["samples"][number]
        )
        expected = ALL[number * len(ALL) // 3 : (number + 1) * len(ALL) // 3]
        assert keys == Counter((each.prompt_index, each.sample_index) for each in expected)


def test_recomputed_values_come_back_to_their_tokens() -> None:
    for each in run_ranks(_deal, 2, 2, 1, 2):
        assert len(each["returned"]) == sum(len(samples) for samples in each["samples"])
        for sample, values in each["returned"]:
            tokens = torch.tensor(sample.rollout.token_ids, dtype=torch.float32)
            assert values[0] == 0.0
            assert torch.equal(values[1:], tokens[1:])


@pytest.mark.parametrize(("world_size", "model_size"), [(1, 1), (2, 1), (4, 2)])
def test_what_is_not_kept_stands_in_rows_of_its_own(world_size: int, model_size: int) -> None:
    """The kept groups 0, 3, 4 and 5 fill the mini-batches, two each, on any number of ranks."""
    of_ranks = run_ranks(_deal, world_size, world_size, model_size, 2, PARTLY_KEPT)
    heads = of_ranks[::model_size]
    assert len({each["num_dropped_rows"] for each in of_ranks}) == 1
    assert of_ranks[0]["num_dropped_rows"] > 0
    for number, prompts in enumerate(((0, 3), (4, 5))):
        dealt = [sample for each in heads for sample in each["samples"][number]]
        expected = [key for key in KEYS if key[0] in prompts and key not in DROPPED]
        keys = sorted((each.prompt_index - FIRST_PROMPT, each.sample_index) for each in dealt)
        assert keys == expected
        assert all(sample.is_kept for sample in dealt)
    dropped = [sample for each in heads for sample in each["dropped"]]
    keys = sorted((each.prompt_index - FIRST_PROMPT, each.sample_index) for each in dropped)
    assert keys == sorted(DROPPED)
    returned = sum(len(each["returned"]) for each in heads)
    assert returned == len(ALL)
    # Of the dropped ones, the response of prompt 3 belongs to a group that is learnt from.
    of_heads = [each["num_left_out"] for each in heads]
    assert [sum(counts) for counts in zip(*of_heads, strict=True)] == [1, 0]
    for rank, each in enumerate(of_ranks):
        assert each["num_left_out"] == of_heads[rank // model_size]


def test_where_everything_is_kept_nothing_is_dropped() -> None:
    for each in run_ranks(_deal, 2, 2, 1, 2):
        assert each["num_dropped_rows"] == 0
        assert len(each["samples"]) == 2
