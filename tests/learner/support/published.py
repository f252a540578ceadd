"""DC-GRPO in plain torch, written from Alg. 1 of its paper (arXiv 2606.08779) alone: with nothing
of this package, no packing, no layout, and autograd through the definition of the objective.

In every step, with the lambda of the step before:

    delta[i,t] = |p_train_old - p_inf|                      at the weights before the step
    A[i]       = (r[i] - mean r) / std r                    in the group of a prompt
    A'[i,t]    = A[i] - lambda * delta[i,t]
    J          = mean over i of 1/|o_i| sum_t min(gamma A', clip(gamma, 1-eps_low, 1+eps_high) A')
    lambda    <- clip(lambda + eta * (sum delta / sum |o_i| - c), lambda_min, lambda_max)

gamma is p_theta / p_train_old. J is maximised in mini-batches, one optimizer step each. The paper
does not say what std r is, nor what happens at 0: the population's, and 1e-6 is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Response:
    """One o_i: prompt and response, which of its tokens are in o_i, and their log p_inf."""

    tokens: Sequence[int]  # L
    is_sampled: Sequence[bool]  # L
    logprobs: Sequence[float]  # L
    reward: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did; the gradients are those of its last mini-batch."""

    loss: float  # -J, of all sequences of the step
    mean_gap: float
    dual_value: float  # lambda after the step
    mean_norm: float  # of the mini-batches' gradients
    gradients: dict[str, torch.Tensor]


Group = Sequence[Response]


def dc_grpo(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[Sequence[Group]],
    *,
    num_mini_batches: int,
    initial: float,
    eta: float,
    c: float,
    bounds: tuple[float, float],
    eps_low: float,
    eps_high: float,
) -> Iterator[Step]:
    """Alg. 1 on recorded responses, step by step."""
    dual_value = initial
    for groups in steps:
        batch = [response for group in groups for response in group]
        with torch.no_grad():
            old = logprobs_of(model, batch)
        rollout = padded(batch, lambda response: response.logprobs).to(old.dtype)
        is_sampled = padded(batch, lambda response: response.is_sampled).bool()
        delta = (old.exp() - rollout.exp()).abs()
        shaped = advantages_of(groups).to(old.dtype)[:, None] - dual_value * delta
        losses, counts, norms = [], [], []
        size = len(batch) // num_mini_batches
        for start in range(0, len(batch), size):
            part = slice(start, start + size)
            gamma = (logprobs_of(model, batch[part], width=old.shape[1]) - old[part]).exp()
            clipped = gamma.clamp(1 - eps_low, 1 + eps_high)
            surrogate = torch.minimum(gamma * shaped[part], clipped * shaped[part])
            of_sequence = torch.where(is_sampled[part], surrogate, 0.0).sum(1)
            lengths = is_sampled[part].sum(1)
            has_tokens = lengths > 0
            loss = -(of_sequence[has_tokens] / lengths[has_tokens]).mean()
            optimizer.zero_grad()
            loss.backward()
            gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
            optimizer.step()
            losses.append(float(loss.detach()))
            counts.append(int(has_tokens.sum()))
            norms.append(float(torch.stack([g.norm() for g in gradients.values()]).norm()))
        mean_gap = float(delta[is_sampled].mean())
        dual_value = min(max(dual_value + eta * (mean_gap - c), bounds[0]), bounds[1])
        yield Step(
            loss=sum(a * n for a, n in zip(losses, counts)) / sum(counts),
            mean_gap=mean_gap,
            dual_value=dual_value,
            mean_norm=sum(norms) / len(norms),
            gradients=gradients,
        )


def advantages_of(groups: Sequence[Group]) -> torch.Tensor:
    """[B] float64: of every response, relative to its group."""
    advantages = []
    for group in groups:
        rewards = torch.tensor([response.reward for response in group], dtype=torch.float64)
        centered = rewards - rewards.mean()
        advantages.append(centered / (rewards.std(unbiased=False) + 1e-6))
    return torch.cat(advantages)


def logprobs_of(
    model: torch.nn.Module, batch: Sequence[Response], width: int | None = None
) -> torch.Tensor:
    """[B, L]: log p of every token, 0 for the first one and for padding."""
    tokens = padded(batch, lambda response: response.tokens).long()
    logits = model(tokens).logits[:, :-1]  # causal, so that padding on the right changes nothing
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(chosen, (1, (width or tokens.shape[1]) - tokens.shape[1]))


def padded(batch: Sequence[Response], of: Callable[[Response], Sequence[float]]) -> torch.Tensor:
    """[B, L] float64, with zeros on the right."""
    rows = [torch.tensor(list(of(response)), dtype=torch.float64) for response in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
