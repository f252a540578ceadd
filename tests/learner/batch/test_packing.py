import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rl.errors import DataError
from megatron_rl.learner.batch.packing import (
    ROW_MULTIPLE,
    deal,
    empty_micro_batch,
    fill,
    largest_size,
    pack,
    row_size,
    sequence_cost,
)
from megatron_rl.records import MicroBatch, Rollout, RolloutHead, Sample


def make_sample(prompt_index, token_ids, num_prompt, *, advantage=0.5, version=3, sample_index=0):
    num_response = len(token_ids) - num_prompt
    rollout = Rollout(
        token_ids=tuple(token_ids),
        loss_mask=(False,) * num_prompt + (True,) * num_response,
        rollout_logprobs=(0.0,) * num_prompt + tuple(-0.1 * (k + 1) for k in range(num_response)),
        weight_versions=(-1,) * num_prompt + (version,) * num_response,
        finish_reason="stop",
        text="",
    )
    return Sample(
        prompt_index=prompt_index,
        sample_index=sample_index,
        rollout=rollout,
        reward=1.0,
        advantage=advantage,
    )


def random_samples(seed, num, longest):
    rng = random.Random(seed)
    samples = []
    for index in range(num):
        length = rng.randint(1, longest)
        num_prompt = rng.randint(1, length)
        # Unique tokens: what stands in a row tells which sequence and place it came from.
        ids = [index * 1000 + place + 1 for place in range(length)]
        samples.append(
            make_sample(index, ids, num_prompt, advantage=rng.gauss(0, 1), version=index)
        )
    return samples


def test_deal_worked_by_hand():
    # 7 to rank 0; 5 to rank 1; 4 to rank 1 (5 < 7); 4 to rank 0 (7 < 9); 1 to rank 1 (9 < 11)
    assert deal([4, 7, 1, 5, 4], 2) == [[1, 4], [0, 2, 3]]
    assert deal([3, 3, 3], 3) == [[0], [1], [2]]
    assert deal([5], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]


def test_a_long_sequence_costs_more_than_short_ones_of_as_many_tokens():
    # By tokens: 8 alone, and 4 + 4. With attention that costs as much as the rest at 4 tokens, the
    # long one is 8 + 64 / 4 = 24, and a short one 4 + 16 / 4 = 8: three of them are as much.
    assert [sequence_cost(length, 4.0) for length in (8, 4)] == [24.0, 8.0]
    lengths = [8, 4, 4, 4]
    assert deal(lengths, 2) == [[0, 3], [1, 2]]
    assert deal([sequence_cost(length, 4.0) for length in lengths], 2) == [[0], [1, 2, 3]]
    assert [sequence_cost(length, math.inf) for length in lengths] == lengths


@pytest.mark.parametrize("seed", range(20))
def test_deal_loses_nothing_and_balances(seed):
    rng = random.Random(seed)
    num_ranks = rng.randint(1, 9)
    lengths = [rng.randint(1, 500) for _ in range(rng.randint(0, 200))]
    shares = deal(lengths, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert shares == deal(lengths, num_ranks)
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_deal_needs_a_rank():
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        deal([1], 0)


def test_pack_the_example_of_the_record():
    (row,) = pack([make_sample(0, (1, 32, 26, 2), 2, advantage=0.75)], tokens_per_row=8)
    assert row.tokens.tolist() == [1, 32, 26, 2, 0, 0, 0, 0]
    assert row.labels.tolist() == [32, 26, 2, 0, 0, 0, 0, 0]
    assert row.loss_mask.tolist() == [False, True, True, False, False, False, False, False]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert row.cu_seqlens.tolist() == [0, 4]
    assert row.cu_seqlens_padded.tolist() == [0, 4]
    assert row.rollout_logprobs.tolist() == pytest.approx([0, -0.1, -0.2, 0, 0, 0, 0, 0])
    assert row.advantages.tolist() == [0.75, 0.75, 0.75, 0.75, 0, 0, 0, 0]
    assert row.weight_versions.tolist() == [-1, 3, 3, -1, -1, -1, -1, -1]
    assert row.sequence_ids.tolist() == [0, 0, 0, 0, -1, -1, -1, -1]


def test_pack_two_sequences():
    samples = [
        make_sample(0, (5, 6, 7), 1, advantage=-1.0),
        make_sample(1, (9, 8, 7, 6, 5), 4, version=4),
    ]
    (row,) = pack(samples, tokens_per_row=12)
    # The longer one first; 4 positions are left.
    assert row.tokens.tolist() == [9, 8, 7, 6, 5, 5, 6, 7, 0, 0, 0, 0]
    assert row.labels.tolist() == [8, 7, 6, 5, 0, 6, 7, 0, 0, 0, 0, 0]
    assert row.loss_mask.nonzero().flatten().tolist() == [3, 5, 6]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert row.sequence_ids.tolist() == [0] * 5 + [1] * 3 + [-1] * 4
    assert row.cu_seqlens.tolist() == [0, 5, 8]
    assert row.cu_seqlens_padded.tolist() == [0, 5, 8]
    assert row.weight_versions.tolist() == [-1] * 3 + [4] + [-1] + [3, 3] + [-1] * 5
    assert row.samples == (samples[1], samples[0])


@pytest.mark.parametrize("seed", range(8))
def test_pack_keeps_every_prediction_once(seed):
    samples = random_samples(seed, 60, 40)
    rows = pack(samples, tokens_per_row=64)
    seen = []
    for row in rows:
        starts = row.cu_seqlens_padded.tolist()
        assert starts[-1] <= 64
        assert len(row.samples) == len(starts) - 1
        for number in range(len(starts) - 1):
            length = int(row.cu_seqlens[number + 1] - row.cu_seqlens[number])
            start = starts[number]
            part = slice(start, start + length)
            sample = samples[int(row.tokens[start]) // 1000]
            assert row.samples[number] is sample
            rollout = sample.rollout
            seen.append(sample.prompt_index)
            assert row.tokens[part].tolist() == list(rollout.token_ids)
            assert row.labels[part].tolist() == [*rollout.token_ids[1:], 0]
            assert row.loss_mask[part].tolist() == [*rollout.loss_mask[1:], False]
            assert row.weight_versions[part].tolist() == [*rollout.weight_versions[1:], -1]
            assert row.positions[part].tolist() == list(range(length))
            assert row.rollout_logprobs[part].tolist() == pytest.approx(
                [*rollout.rollout_logprobs[1:], 0.0]
            )
            assert torch.equal(row.advantages[part], torch.tensor([sample.advantage] * length))
            assert (row.sequence_ids[part] == number).all()
        outside = row.sequence_ids == -1
        assert int(outside.sum()) == 64 - int(row.cu_seqlens[-1])
        assert not row.loss_mask[outside].any()
        for field in (row.tokens, row.labels, row.rollout_logprobs, row.advantages):
            assert (field[outside] == 0).all()
    assert sorted(seen) == list(range(60))
    assert sum(int(row.loss_mask.sum()) for row in rows) == sum(
        sample.rollout.num_response_tokens for sample in samples
    )


def with_head(sample, token_ids):
    head = RolloutHead(
        token_ids=np.array(token_ids, dtype=np.int32),
        logprobs=-np.array(token_ids, dtype=np.float32) / 8,
    )
    return replace(sample, rollout=replace(sample.rollout, head=head))


def test_heads_stand_where_their_tokens_are_predicted():
    samples = [
        with_head(make_sample(0, (5, 6, 7), 1), [(60, 61), (70, -1)]),
        make_sample(1, (4,), 1),  # no response, and so no head
        with_head(make_sample(2, (9, 8, 7, 6, 5), 4), [(50, 51)]),
    ]
    (row,) = pack(samples, tokens_per_row=10)
    none = [-1, -1]
    # The longest first: its only response token is predicted at 3; those of the second at 5 and 6.
    expected = [none] * 3 + [[50, 51], none, [60, 61], [70, -1]] + [none] * 3
    assert row.head_ids.tolist() == expected
    assert (row.head_ids.dtype, row.rollout_head_logprobs.dtype) == (torch.int32, torch.float32)
    assert row.rollout_head_logprobs[3].tolist() == [-6.25, -6.375]
    assert row.rollout_head_logprobs[~row.loss_mask].eq(-torch.inf).all()
    (without,) = pack([make_sample(0, (5, 6, 7), 1)], tokens_per_row=10)
    for batch in (without, empty_micro_batch(10)):
        assert batch.head_ids is None and batch.rollout_head_logprobs is None


def test_heads_of_some_sequences_or_of_several_sizes_are_refused():
    whole = with_head(make_sample(0, (5, 6, 7), 1), [(60, 61), (70, 71)])
    for other, got in (
        (make_sample(3, (5, 6), 1), r"heads of \[2\] tokens for 2 of them"),
        (with_head(make_sample(3, (5, 6), 1), [(1, 2, 3)]), r"heads of \[2, 3\] tokens for 3 of"),
    ):
        with pytest.raises(DataError, match=rf"prompts \[0, 3\]: .* 3 response tokens, got {got}"):
            pack([whole, other], tokens_per_row=10)


def test_pack_is_deterministic_and_dense():
    samples = random_samples(1, 200, 60)
    first, second = (pack(samples, tokens_per_row=256) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second))
    num_tokens = sum(len(sample.rollout.token_ids) for sample in samples)
    assert len(first) <= 11 / 9 * -(-num_tokens // 256) + 1  # the bound of first fit decreasing


def test_pack_dtypes():
    optional = {"samples", "head_ids", "rollout_head_logprobs", "routes"}
    (row,) = pack(random_samples(0, 3, 5), tokens_per_row=32)
    for batch in (row, empty_micro_batch(32)):
        expected = {
            "loss_mask": torch.bool,
            "rollout_logprobs": torch.float32,
            "advantages": torch.float32,
            "cu_seqlens": torch.int32,
            "cu_seqlens_padded": torch.int32,
        }
        for name in set(MicroBatch.__slots__) - optional:
            tensor = getattr(batch, name)
            assert tensor.dtype == expected.get(name, torch.int64), name
            if not name.startswith("cu_"):
                assert tensor.shape == (32,)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(
        DataError, match=r"prompt 7, sample 2: .*at most 4 tokens, got 5.*tokens_per_micro_batch"
    ):
        pack([make_sample(7, (1, 2, 3, 4, 5), 2, sample_index=2)], tokens_per_row=4)
    with pytest.raises(DataError, match="first token from the prompt"):
        pack([make_sample(7, (1, 2), 0)], tokens_per_row=4)
    broken = Rollout(
        token_ids=(1, 2),
        loss_mask=(False, True),
        rollout_logprobs=(0.0,),
        weight_versions=(-1, 0),
        finish_reason="stop",
        text="",
    )
    with pytest.raises(DataError, match="2 tokens and 2, 1, 2"):
        pack(
            [Sample(prompt_index=0, sample_index=0, rollout=broken, reward=0.0, advantage=0.0)],
            tokens_per_row=4,
        )


def test_fill_reaches_the_common_count_with_masked_rows():
    rows = pack(random_samples(0, 10, 16), tokens_per_row=16)
    filled = fill(rows, len(rows) + 3, 16)
    assert filled[: len(rows)] == rows
    for row in filled[len(rows) :]:
        assert not row.loss_mask.any()
        assert row.cu_seqlens.tolist() == [0, 1]
        assert row.cu_seqlens_padded.tolist() == [0, 16]
        assert row.sequence_ids.tolist() == [0] + [-1] * 15
        assert row.samples == ()
    assert len(fill([], 2, 8)) == 2
    with pytest.raises(ValueError, match="at most 0"):
        fill(rows, 0, 16)


def test_rows_are_as_long_as_their_sequences_need() -> None:
    samples = [make_sample(index, tuple(range(3, 3 + n)), 1) for index, n in enumerate((90, 60, 5))]
    rows = pack(samples, tokens_per_row=100)  # 90 + 5, and 60
    assert [row.tokens.numel() for row in rows] == [100, 64]  # 128 is more than the budget
    assert [row.positions.numel() for row in rows] == [100, 64]
    assert largest_size([90, 60, 5], 100) == 100
    uniform = pack(samples, tokens_per_row=100, min_size=100)
    assert [row.tokens.numel() for row in uniform] == [100, 100]
    assert [row.tokens.numel() for row in pack(samples[2:], tokens_per_row=500)] == [ROW_MULTIPLE]
    assert pack([], tokens_per_row=100, min_size=64) == []
    assert largest_size([], 100) == 0


def test_sequences_are_padded_for_the_ranks_that_share_a_row():
    samples = [make_sample(0, (1, 2, 3, 4, 5), 2), make_sample(1, (6, 7, 8), 1, advantage=2.0)]
    (row,) = pack(samples, tokens_per_row=16, multiple=4, sequence_multiple=4)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 0, 0, 0, 0, 0]
    assert row.labels.tolist() == [2, 3, 4, 5, 0, 0, 0, 0, 7, 8, 0, 0, 0, 0, 0, 0]
    assert row.loss_mask.nonzero()[:, 0].tolist() == [1, 2, 3, 8, 9]
    assert row.positions.tolist() == [*range(8), *range(4), *range(4)]
    assert row.sequence_ids.tolist() == [*[0] * 5, *[-1] * 3, *[1] * 3, *[-1] * 5]
    assert row.advantages[8:].tolist() == [2.0] * 3 + [0.0] * 5
    assert row.cu_seqlens.tolist() == [0, 5, 8]
    assert row.cu_seqlens_padded.tolist() == [0, 8, 12]
    # 5 and 3 tokens fill a row of 12; with their padding, two rows of 8 would not hold both
    assert len(pack(samples, tokens_per_row=8, multiple=4, sequence_multiple=4)) == 2


def test_rows_can_be_divided_among_ranks():
    samples = [make_sample(0, range(1, 91), 1), make_sample(1, range(1, 61), 1)]
    rows = pack(samples, tokens_per_row=192 * 3, multiple=3)  # a multiple of 64 and of 3
    assert [row.tokens.numel() for row in rows] == [192]
    assert largest_size([90, 60], 576, 3) == row_size(1, 576, 3) == 192
    assert row_size(500, 510, 3) == 510
