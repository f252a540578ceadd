"""The input and output types of every policy loss: the interface between `policy_loss.py`, which
masks, weights and reports, and the surrogates in `policy/`, one file each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tokens of one packed row. Every [T] float tensor is 0 where the mask is False.

    Example of two tokens, the second one masked: `LossInputs(policy_logprobs=[-0.7, 0.0],
    old_logprobs=[-0.9, 0.0], advantages=[1.5, 0.0], mask=[True, False], sequence_ids=[0, 0],
    clip_low=0.2, clip_high=0.28, ratio_cap=0.0, dual_clip=0.0)`.
    """

    policy_logprobs: torch.Tensor  # [T] float32, under gradient
    # [T] float32, no gradient: of the policy in the ratio's denominator, which is the learner
    # before the update (recomputed_logprobs) or the engine (rollout_logprobs)
    old_logprobs: torch.Tensor
    advantages: torch.Tensor  # [T] float32, no gradient: shaped by the constraint
    mask: torch.Tensor  # [T] bool, True where the token is kept
    sequence_ids: torch.Tensor  # [T] int64, 0 to S-1, -1 on padding
    clip_low: float  # how far the policy may move down and up, in ratio unless the loss says so
    clip_high: float
    ratio_cap: float  # at which a larger ratio is truncated; 0: it is not
    dual_clip: float  # of PPO's dual clip, above 1; 0: off

    @classmethod
    def of(
        cls,
        *,
        policy_logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        sequence_ids: torch.Tensor,
        clip_low: float,
        clip_high: float,
        ratio_cap: float,
        dual_clip: float,
    ) -> LossInputs:
        """Mask the tensors and detach those without gradient.

        Args:
            policy_logprobs, old_logprobs, advantages: [T], any float dtype. Their values where the
                mask is False have no effect, including NaN and infinities.
            mask: [T] bool. sequence_ids: [T] int64.

        Raises:
            ValueError: the shape of a tensor differs from that of the mask.
        """
        for name, tensor in (
            ("policy_logprobs", policy_logprobs),
            ("old_logprobs", old_logprobs),
            ("advantages", advantages),
            ("sequence_ids", sequence_ids),
        ):
            check_shape(name, tensor, mask)
        # Masked before the exponential: otherwise its backward pass would compute 0 * inf = NaN
        # even where the mask is False.
        return cls(
            policy_logprobs=torch.where(mask, policy_logprobs.float(), 0.0),
            old_logprobs=torch.where(mask, old_logprobs.detach().float(), 0.0),
            advantages=torch.where(mask, advantages.detach().float(), 0.0),
            mask=mask,
            sequence_ids=sequence_ids,
            clip_low=clip_low,
            clip_high=clip_high,
            ratio_cap=ratio_cap,
            dual_clip=dual_clip,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """The result of a policy loss: the surrogate of every token, to be maximised.

    Example of one token, r = 2, A = 3, bounds 0.8 to 1.2: `Surrogate(values=[3.6],
    ratio=[2.0], is_clipped_low=[False], is_clipped_high=[True], is_capped=[False],
    is_dual_clipped=[False])`.
    """

    values: torch.Tensor  # [T] float32, under gradient
    # [T] float64, no gradient: the ratio before it is clipped or capped; for gspo the sequence's
    ratio: torch.Tensor
    is_clipped_low: torch.Tensor  # [T] bool, True where the lower bound acted
    is_clipped_high: torch.Tensor  # [T] bool
    is_capped: torch.Tensor  # [T] bool, True where the cap on the ratio acted
    is_dual_clipped: torch.Tensor  # [T] bool, True where the dual clip acted


PolicyLoss = Callable[[LossInputs], Surrogate]


def check_shape(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise ValueError if the shape of a tensor of the policy loss differs from the mask's."""
    if tensor.shape != mask.shape:
        raise ValueError(
            f"policy loss: expected {name} of the mask's shape {tuple(mask.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
