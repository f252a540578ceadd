"""Rows of logits, the way through all shards, and the comparison of bits: what the tests of every
kernel share.
"""

from __future__ import annotations

import itertools
import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [1.0, 0.7, 1.3]
NAMES = ("logprobs", "entropy", "exponent", "sum", "maximum", "gradient")


class Native:
    """The operators of one instruction set, with the signatures of `reference`."""

    def __init__(self, instruction_set):
        operators = torch.ops.megatron_rl
        self.nodes = lambda *given: operators.token_logprobs_nodes(*given, instruction_set)
        self.finish = lambda *given: operators.token_logprobs_finish(*given, instruction_set)
        self.gradient = lambda *given: operators.token_logprobs_gradient(*given, instruction_set)


def make_problem(num_rows, vocab_size, dtype, scale=3.0):
    """Rows of every kind: plain, peaked, flat, with -inf in places, and with a huge gap."""
    logits = torch.randn(num_rows, vocab_size) * scale
    labels = torch.randint(vocab_size, (num_rows,))
    incoming = torch.randn(num_rows)
    for row in range(0, num_rows, 6):
        kinds = logits[row : row + 6]
        if len(kinds) == 6:
            kinds[1, labels[row + 1]] += 40.0
            kinds[2] = 1.5
            kinds[3, torch.rand(vocab_size) < 0.5] = -math.inf
            kinds[3, labels[row + 3]] = 0.25
            kinds[4, vocab_size // 3 :] = -math.inf
            kinds[4, 0] = 2.0
            kinds[5, vocab_size // 2 :] -= 3e4
            incoming[row + 2], incoming[row + 3] = 0.0, 1e-30
    return logits.to(dtype), labels, incoming


def run_shards(ops, logits, labels, incoming, *, temperature, edges, vocab_size, has_entropy=True):
    """Everything, through simulated shards with the given edges."""
    pairs = list(itertools.pairwise(edges))
    shards = [logits[:, begin:end] for begin, end in pairs]
    words = [
        ops.nodes(shard, labels, temperature, edges, rank, vocab_size, has_entropy)
        for rank, shard in enumerate(shards)
    ]
    finished = ops.finish(torch.stack(words), labels, edges, vocab_size, has_entropy)
    gradients = []
    for (begin, _), shard in zip(pairs, shards):
        gradients.append(torch.full_like(shard, 7.0).contiguous())
        ops.gradient(
            shard,
            labels,
            incoming,
            finished[2],
            finished[3],
            temperature,
            begin,
            vocab_size,
            gradients[-1],
        )
    return (*finished, torch.cat(gradients, dim=1))


def bits_of(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same_bits(got, expected):
    for name, a, b in zip(NAMES, got, expected):
        assert torch.equal(bits_of(a), bits_of(b)), name


def pad_columns(logits, num_columns):
    """With what may stand in padded columns: they count for nothing."""
    padding = torch.full((logits.shape[0], num_columns - logits.shape[1]), math.nan)
    return torch.cat([logits, padding.to(logits.dtype)], dim=1)
