"""Measures what score centering leaves of the mean score if the engine sends K log-probs a token.

    python tools/score_centering_error.py [--vocab-size 151936] [--rows 16]

The score of a token is the gradient of its weighted log-prob by the learner's logits; its mean over
the engine's tokens is what score centering subtracts. With a head of K tokens the subtracted mean
is exact for the tokens of the head, and takes one ratio for all others. Distributions are Zipf's:
the r-th likeliest token of the engine has a logit of -s log r, and the learner's logits differ from
the engine's by a normal number of standard deviation d. Printed is a table in Markdown: for each s,
d and weight the norm of the mean score, and the share of it that is left with each K; both are
means over the rows. With the whole vocabulary in the head nothing is left but rounding.

With the weight min(rho, 2) only tokens whose rho is above 2 have a mean score at all: importance
sampling is centered by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from megatron_rl.objective.importance import importance_weights
from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.policy import policy_loss_named
from megatron_rl.objective.score_centering import (
    HeadLogprobs,
    TokenWeights,
    centering_coefficients,
)

SIZES = (8, 32, 128)
EXPONENTS = (3.0, 1.5, 1.1)  # a confident, a middling and an unsure policy
ROUNDING = 1e-6
GAPS = (0.05, 0.5)  # rounding to BF16, and weights of a few steps ago


def truncated(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, *, upper: float
) -> torch.Tensor:
    """`min(rho, upper)` of tokens [N]."""
    everything = torch.ones_like(old_logprobs, dtype=torch.bool)
    weights, _ = importance_weights(
        old_logprobs,
        rollout_logprobs,
        everything,
        everything.long(),
        level="token",
        mode="truncate",
        lower=0.0,
        upper=upper,
    )
    return weights


WEIGHTS: dict[str, TokenWeights | None] = {"1": None, "min(rho, 2)": partial(truncated, upper=2.0)}


def distributions(
    exponent: float, gap: float, *, vocab_size: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] float64 log-probs of the engine and of the learner, the engine's likeliest first."""
    generator = torch.Generator().manual_seed(0)
    logits = -exponent * torch.arange(1, vocab_size + 1).double().log().expand(num_rows, -1)
    noise = torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(1), (logits + gap * noise).log_softmax(1)


def mean_score(
    rollout: torch.Tensor, learner: torch.Tensor, weights: TokenWeights | None
) -> torch.Tensor:
    """[N, V] the mean over the engine's tokens of the gradient of weight * log-prob."""
    factor = 1.0
    if weights is not None:
        factor = weights(learner.reshape(-1), rollout.reshape(-1)).view_as(learner).double()
    return _gradient(rollout.exp() * factor, learner)


def centered(
    rollout: torch.Tensor, learner: torch.Tensor, size: int, weights: TokenWeights | None
) -> torch.Tensor:
    """[N, V] the mean that score centering subtracts with a head of `size` tokens."""
    num_rows = len(rollout)
    nothing, kept = torch.zeros(num_rows), torch.ones(num_rows, dtype=torch.bool)
    inputs = LossInputs.of(
        policy_logprobs=nothing,
        old_logprobs=nothing,
        advantages=nothing + 1.0,
        mask=kept,
        sequence_ids=torch.arange(num_rows),
        clip_low=0.2,
        clip_high=0.24,
        ratio_cap=0.0,
        dual_clip=0.0,
    )
    heads = HeadLogprobs(
        is_present=torch.ones(num_rows, size, dtype=torch.bool),
        policy=learner[:, :size],
        old=learner[:, :size],
        rollout=rollout[:, :size],
    )
    coefficients = torch.zeros_like(rollout)
    coefficients[:, :size] = centering_coefficients(
        policy_loss_named("ppo_clip"), inputs, heads, weights
    )
    return _gradient(coefficients, learner)


def _gradient(coefficients: torch.Tensor, learner: torch.Tensor) -> torch.Tensor:
    """The gradient of sum_v c[v] log p[v] by the logits, [N, V]."""
    return coefficients - coefficients.sum(1, keepdim=True) * learner.exp()


def table(
    sizes: Sequence[int],
    *,
    exponents: Sequence[float],
    gaps: Sequence[float],
    vocab_size: int,
    num_rows: int,
) -> Iterator[str]:
    """The lines of the table in Markdown."""
    yield (
        "| s | nats | d | weight | mean score | "
        + " | ".join(f"left, K={size}" for size in sizes)
        + " |"
    )
    yield "|---" * (5 + len(sizes)) + "|"
    for exponent in exponents:
        for gap in gaps:
            rollout, learner = distributions(
                exponent, gap, vocab_size=vocab_size, num_rows=num_rows
            )
            entropy = float(-(rollout.exp() * rollout).sum(1).mean())
            for name, weights in WEIGHTS.items():
                whole = mean_score(rollout, learner, weights)
                norm = float(whole.norm(dim=1).mean())
                left = (whole - centered(rollout, learner, size, weights) for size in sizes)
                shares = [f"{float(each.norm(dim=1).mean()) / norm:.1%}" for each in left]
                if norm < ROUNDING:  # no weight was bounded: the mean score is 0 without centering
                    shares = ["none"] * len(sizes)
                yield (
                    f"| {exponent:g} | {entropy:.2f} | {gap:g} | {name} | {norm:.1e} | "
                    + " | ".join(shares)
                    + " |"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=151936, help="default: Qwen3's")
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args(arguments)
    for line in table(
        SIZES,
        exponents=EXPONENTS,
        gaps=GAPS,
        vocab_size=options.vocab_size,
        num_rows=options.rows,
    ):
        print(line, flush=True)


if __name__ == "__main__":
    main()
