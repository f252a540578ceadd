"""The support of a truncating sampler, against an oracle that sorts."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import distributed

from megatron_rl.ops import kernels, support, support_reference
from megatron_rl.ops.logprobs import token_logprobs, token_logprobs_and_entropy
from megatron_rl.ops.reference import scaled
from megatron_rl.ops.support import find_support, keep_support
from megatron_rl.ops.support_logprobs import support_logprobs
from megatron_rl.ops.vocab_parallel import VocabShard
from megatron_rl.records import Truncation
from tests.support.distributed import run_ranks

kernels.load()
OPS = torch.ops.megatron_rl
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRUNCATIONS = [
    Truncation(top_k=top_k, top_p=top_p, min_p=min_p, ties=ties)
    for top_k, top_p, min_p, ties in itertools.product(
        (0, 7), (1.0, 0.8), (0.0, 0.05), ("all", "exact")
    )
    if (top_k, top_p, min_p) != (0, 1.0, 0.0) and (top_k > 0 or ties == "all")
]
NAMES = [f"k{each.top_k}-p{each.top_p}-min{each.min_p}-{each.ties}" for each in TRUNCATIONS]


def _rows(num_rows, vocab_size, dtype):
    """Rows with many ties, with few, flat ones, peaked ones, and with -inf in places."""
    logits = torch.randn(num_rows, vocab_size) * 2.0
    logits[::2] = (logits[::2] * 2).round() / 2
    logits[::5] += torch.rand(len(logits[::5]), 1) * 10
    logits[::7] = logits[::7, :1]
    logits[3::9, vocab_size // 5 :] = -math.inf
    logits[4::11, ::2] = -0.0
    labels = torch.randint(vocab_size, (num_rows,))
    labels[::2] = logits[::2].argmax(1)
    return logits.to(dtype), labels


def _oracle(row, label, truncation, temperature):
    """The columns of one row's support, by sorting: a set, and whether the label is one of them.

    Probabilities are the integers of the aligned term, so that the sums are the same ones.
    """
    y = scaled(row, temperature)
    order = sorted(range(len(y)), key=lambda j: (-y[j], j != label, j))
    order = [j for j in order if y[j] > -math.inf]
    maximum = y.max()
    terms = support_reference.terms(y, maximum).double()
    masses = support_reference.masses(y, maximum).tolist()
    if truncation.min_p:
        share = torch.tensor(truncation.min_p).double()
        order = [j for j in order if terms[j] >= share * terms.max()]
    y = y.tolist()
    if truncation.top_k:
        kept = order[: truncation.top_k]
        if truncation.ties == "all":
            kept = [j for j in order if y[j] >= y[kept[-1]]]
        order = kept
    if truncation.top_p < 1.0:
        wanted = sum(masses[j] for j in order) * torch.tensor(truncation.top_p).double().item()
        kept, above = [], 0
        for j in order:
            if above < wanted:
                kept.append(j)
            above += masses[j]
        order = kept
    return {*order, label}, label in order


def _shards(logits, num_shards):
    """Logits cut in equal shards, the last ones padded with what must not count."""
    width = -(-logits.shape[1] // num_shards)
    padding = torch.full((logits.shape[0], width * num_shards - logits.shape[1]), 9e3)
    padded = torch.cat([logits, padding.to(logits.dtype)], dim=1)
    edges = tuple(width * rank for rank in range(num_shards + 1))
    shards = [
        VocabShard(rank=rank, edges=edges, vocab_size=logits.shape[1]) for rank in range(num_shards)
    ]
    return [padded[:, a:b] for a, b in itertools.pairwise(edges)], shards


def _kept_columns(logits, labels, truncation, temperature):
    maximum = scaled(logits, temperature).amax(1)
    [pieces], [shard] = _shards(logits, 1)
    found = find_support(
        pieces,
        labels,
        maximum,
        truncation=truncation,
        temperature=temperature,
        shard=shard,
        group=None,
    )
    kept = keep_support(pieces, labels, found, temperature=temperature, shard=shard)
    return kept, found


def _compare_with_the_oracle(truncation, dtype, num_rows):
    torch.manual_seed(0)
    num_different = 0
    for vocab_size, temperature in ((61, 1.0), (128, 0.7), (150, 1.3)):
        logits, labels = _rows(num_rows, vocab_size, dtype)
        kept, found = _kept_columns(logits, labels, truncation, temperature)
        for row in range(len(logits)):
            expected, is_inside = _oracle(logits[row], int(labels[row]), truncation, temperature)
            columns = {*(kept[row] > -math.inf).nonzero()[:, 0].tolist()}
            # A label at -inf is kept as it is.
            expected -= {int(labels[row])} if logits[row, labels[row]] == -math.inf else set()
            assert columns == expected, (vocab_size, row)
            assert found.is_outside[row].item() is not is_inside
            assert torch.equal(kept[row, [*columns]], logits[row, [*columns]])
            num_different += len(columns) < vocab_size
    assert num_different > num_rows


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_support_is_that_of_an_oracle_that_sorts(truncation, dtype):
    _compare_with_the_oracle(truncation, dtype, 75)  # 3 sizes, 11 ways, 2 dtypes: 4,950 rows


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_support_of_many_rows_is_that_of_an_oracle_that_sorts(truncation, dtype):
    _compare_with_the_oracle(truncation, dtype, 700)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kernels_find_what_the_reference_finds(dtype, temperature):
    torch.manual_seed(0)
    logits, labels = _rows(20, 5000, dtype)
    logits[1, 7] = math.nan
    maximum = scaled(logits, temperature).nan_to_num(nan=0.0).amax(1)
    keys = support_reference.keys(logits, temperature)
    low, high = keys[:, :50].amin(1), keys[:, 50:90].amax(1)
    low[5] = high[5] + 1
    for shift, has_masses in itertools.product(
        range(0, support_reference.key_bits(dtype), 8), (False, True)
    ):
        given = (logits, maximum, low, high, temperature, 4990, shift, has_masses)
        expected = support_reference.histogram(*given)
        for name in OPS.instruction_sets():
            assert torch.equal(OPS.support_histogram(*given, name), expected)
    quota = torch.randint(5, (20,))
    for edge in (keys[:, 50], torch.full((20,), -1)):
        given = (logits, edge, quota, labels - 30, temperature, 4990)
        got, expected = OPS.support_keep(*given), support_reference.keep(*given)
        assert torch.equal(got.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_a_key_orders_as_its_logit_and_leads_back_to_it(dtype, temperature):
    logits = torch.randn(4000).to(dtype) * 1e3
    logits[:5] = torch.tensor([-math.inf, math.inf, 0.0, -0.0, 1.0]).to(dtype)
    keys = support_reference.keys(logits, temperature)
    y = scaled(logits, temperature)
    assert torch.equal(keys[:, None] < keys, y[:, None] < y)
    assert torch.equal(support_reference.logits_of(keys, dtype, temperature), y)
    assert keys[0] == support_reference.key_of_minus_infinity(dtype)
    assert keys[2] == keys[3]


def test_a_mass_is_the_probability_in_units_of_2_to_the_minus_40():
    y = torch.linspace(-20, 0, 500)
    maximum = torch.zeros(1)
    masses = support_reference.masses(y, maximum).double() / 2**40
    torch.testing.assert_close(masses, y.double().exp(), rtol=2e-7, atol=2.0**-40)


def _exact_logprobs(kept, labels, temperature):
    return torch.log_softmax(kept.double() / temperature, dim=1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("truncation", [TRUNCATIONS[0], Truncation(top_k=9, top_p=0.9, min_p=0.01)])
def test_logprobs_and_gradients_are_those_of_the_truncated_distribution(dtype, truncation):
    torch.manual_seed(0)
    logits = (torch.randn(40, 300) * 3).to(dtype)
    labels = logits.argsort(dim=1, descending=True)[torch.arange(40), torch.arange(40) % 20]
    kept, found = _kept_columns(logits, labels, truncation, 0.7)
    assert found.is_outside[:20].any()
    assert not found.is_outside[:20].all()
    leaf = logits.clone().requires_grad_()
    got = support_logprobs(leaf, labels, truncation=truncation, temperature=0.7)
    exact = torch.where(kept > -math.inf, logits.double(), -math.inf).requires_grad_()
    expected = _exact_logprobs(exact, labels, 0.7)
    error = (got.logprobs - expected).abs() / expected.abs().clamp(min=1.0)
    assert error.max().item() <= 4e-6  # the division by the temperature is rounded
    full, entropy = token_logprobs_and_entropy(logits, labels, temperature=0.7)
    assert torch.equal(got.full_logprobs, full)
    assert torch.equal(got.entropy, entropy)
    assert torch.equal(got.is_outside, found.is_outside)

    incoming = torch.randn(40)
    got.logprobs.backward(incoming, retain_graph=True)
    expected.backward(incoming.double())
    assert leaf.grad[kept == -math.inf].eq(0).all()
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=1e-6)
    of_support = leaf.grad.clone()
    leaf.grad = None
    got.full_logprobs.backward(incoming)
    other = logits.clone().requires_grad_()
    token_logprobs(other, labels, temperature=0.7).backward(incoming)
    assert torch.equal(leaf.grad, other.grad)
    assert not torch.equal(leaf.grad, of_support)


def test_a_label_outside_is_kept_and_told():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]] * 4).log_softmax(1)
    labels = torch.arange(4)
    got = support_logprobs(logits, labels, truncation=Truncation(top_k=2, ties="exact"))
    p = logits[0].double().exp()
    expected = [
        p[0] / p[:2].sum(),
        p[1] / p[:2].sum(),
        p[2] / p[:2].sum(),
        p[3] / p[[0, 1, 3]].sum(),
    ]
    assert got.logprobs.exp().tolist() == pytest.approx([float(x) for x in expected], rel=1e-6)
    assert got.is_outside.tolist() == [False, False, False, True]
    every_tie = support_logprobs(logits, labels, truncation=Truncation(top_k=2)).logprobs.exp()
    assert every_tie[1].item() == pytest.approx(float(p[1] / p[:3].sum()), rel=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": math.nan}, {"min_p": 1.0}, {"ties": "some"}]
)
def test_a_truncation_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="expected top_k"):
        Truncation(**wrong)


def test_nothing_excluded_is_the_whole_distribution():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 50), torch.randint(50, (9,))
    expected = token_logprobs(logits, labels)
    assert not Truncation().is_active
    for truncation in (Truncation(), Truncation(top_k=60), Truncation(top_p=1 - 1e-7, min_p=1e-9)):
        got = support_logprobs(logits, labels, truncation=truncation)
        assert torch.equal(got.logprobs, expected)
        assert not got.is_outside.any()


@pytest.mark.parametrize("overwrite_logits", [False, True])
def test_ignored_rows_and_logits_that_are_written_over(overwrite_logits):
    torch.manual_seed(0)
    leaf = torch.randn(6, 40, requires_grad=True)
    logits, labels = leaf * 1.0, torch.randint(40, (6,))
    labels[2], labels[5] = -100, -100
    with torch.no_grad():
        logits[5, 3] = math.nan
    got = support_logprobs(
        logits,
        labels,
        truncation=Truncation(top_k=5),
        ignore_index=-100,
        overwrite_logits=overwrite_logits,
    )
    for values in (got.logprobs, got.full_logprobs, got.entropy, got.is_outside):
        assert values[[2, 5]].eq(0).all()
    got.logprobs.sum().backward()
    is_counted = labels >= 0
    expected = leaf.detach()[is_counted].requires_grad_()
    support_logprobs(
        expected, labels[is_counted], truncation=Truncation(top_k=5)
    ).logprobs.sum().backward()
    assert torch.equal(leaf.grad[is_counted], expected.grad)
    assert leaf.grad[~is_counted].eq(0).all()


def _outcome(logits, labels, incoming, truncation, vocab_size, group=None):
    """Every number that must not depend on the shards, and this shard's gradient."""
    leaf = logits.clone().requires_grad_()
    got = support_logprobs(
        leaf, labels, truncation=truncation, temperature=0.7, vocab_size=vocab_size, group=group
    )
    (got.logprobs @ incoming + got.full_logprobs @ incoming.flip(0)).backward()
    of_rows = torch.stack([got.logprobs, got.full_logprobs, got.entropy, got.is_outside.float()])
    return of_rows.detach(), leaf.grad


def _problem(dtype, vocab_size=1000):
    torch.manual_seed(1)
    logits, labels = _rows(40, vocab_size, dtype)
    labels[::2] = logits[::2].argsort(dim=1, descending=True)[:, 6]  # often on the edge
    return logits, labels, torch.randn(40)


def _rank_outcomes(rank, dtype):
    logits, labels, incoming = _problem(dtype)
    group = distributed.group.WORLD
    shards, _ = _shards(logits, group.size())
    return [
        _outcome(shards[rank], labels, incoming, truncation, logits.shape[1], group)
        for truncation in TRUNCATIONS
    ]


def _assert_shards_agree(of_ranks, dtype):
    logits, labels, incoming = _problem(dtype)
    for index, truncation in enumerate(TRUNCATIONS):
        of_rows, gradient = _outcome(logits, labels, incoming, truncation, logits.shape[1])
        assert of_rows[3].any()
        for of_rank in of_ranks:
            assert torch.equal(of_rank[index][0].view(torch.int32), of_rows.view(torch.int32))
        joined = torch.cat([of_rank[index][1] for of_rank in of_ranks], dim=1)
        assert torch.equal(joined[:, : gradient.shape[1]], gradient)
        assert joined[:, gradient.shape[1] :].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_change_no_bit(world_size, dtype):
    _assert_shards_agree(run_ranks(_rank_outcomes, world_size, dtype), dtype)


class _Ranks:
    """A process group of threads: what a rank gives is there for all once the last one gave it."""

    def __init__(self, size):
        self.given = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank, tensor):
        self.given[rank] = tensor.clone()
        self.barrier.wait()
        everything = torch.stack(self.given)
        self.barrier.wait()
        return everything


class _Rank:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.size = ranks, lambda: rank, lambda: len(ranks.given)


@pytest.mark.parametrize("num_shards", [4, 6, 40])
def test_simulated_shards_change_no_bit(num_shards, monkeypatch):
    def gather(rows, group):
        return rows[None] if group is None else group.ranks.exchange(group.rank(), rows)

    monkeypatch.setattr(support, "gather_rows", gather)
    monkeypatch.setattr(kernels, "gather_rows", gather)
    monkeypatch.setattr(support, "all_reduce_sum", lambda rows, group: gather(rows, group).sum(0))
    ranks = _Ranks(num_shards)
    logits, labels, incoming = _problem(torch.bfloat16)
    shards, _ = _shards(logits, num_shards)

    def run(rank):
        group = _Rank(ranks, rank)
        return [
            _outcome(shards[rank], labels, incoming, truncation, logits.shape[1], group)
            for truncation in TRUNCATIONS
        ]

    with ThreadPoolExecutor(num_shards) as pool:
        _assert_shards_agree(list(pool.map(run, range(num_shards))), torch.bfloat16)
