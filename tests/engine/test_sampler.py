"""What the learner believes of the engine's sampler is what the installed vLLM does on a CPU."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.loop.preflight import truncation_of
from megatron_rl.ops.support import find_support, keep_support
from megatron_rl.ops.vocab_parallel import vocab_shard
from megatron_rl.records import Truncation


def _of_engine(logits: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """[N, V] float32 logits at temperature 1.3, -inf outside the support."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    num_rows = len(logits)
    y = logits.float() / torch.full((num_rows, 1), 1.3)
    top_k = torch.full((num_rows,), truncation.top_k, dtype=torch.int32)
    top_p = torch.full((num_rows,), truncation.top_p)
    return apply_top_k_top_p(
        y, top_k if truncation.top_k else None, top_p if truncation.top_p < 1 else None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "top_p"), [(20, 1.0), (0, 0.9), (20, 0.9), (7, 0.8)])
def test_the_cpu_engine_keeps_as_many_equal_logits_as_the_learner(top_k, top_p, dtype):
    rollout = RolloutConfig(sampling=SamplingConfig(top_k=top_k, top_p=top_p))
    truncation = truncation_of(rollout, "cpu")
    torch.manual_seed(0)
    logits = torch.randn(400, 130) * 2
    logits[::2] = (logits[::2] * 2).round() / 2  # many of them equal
    logits = logits.to(dtype)
    labels = logits.argmax(1)
    shard = vocab_shard(130, None, None)
    support = find_support(
        logits,
        labels,
        logits.float().amax(1) / 1.3,
        truncation=truncation,
        temperature=1.3,
        shard=shard,
        group=None,
    )
    kept = keep_support(logits, labels, support, temperature=1.3, shard=shard).float() / 1.3
    expected = _of_engine(logits, truncation)
    # Of equal logits on the edge of top_p, the engine's sort chooses: compared by value.
    assert torch.equal(kept.sort(1).values, expected.sort(1).values)
    if top_p == 1.0:
        assert torch.equal(kept, expected)
        assert (expected > -math.inf).sum(1).max() > top_k


def test_ties_follow_the_device_unless_told():
    for told, device, expected in (
        ("auto", "cpu", "all"),
        ("auto", "cuda", "exact"),
        ("exact", "cpu", "exact"),
    ):
        config = RolloutConfig(top_k_ties=told, sampling=SamplingConfig(top_k=5, min_p=0.1))
        got = truncation_of(config, device)
        assert got == Truncation(top_k=5, min_p=0.1, ties=expected)
