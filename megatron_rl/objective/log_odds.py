"""Histograms of the log-odds displacement of sampled tokens, by the engine's confidence in them.

    eps = logit p_train - logit p_inf,   logit p = log p - log(1 - p)

A shift of the logits moves the log-odds of a token by about the same amount at every confidence,
whereas rho = p_train / p_inf stays near 1 for a likely token and |p_train - p_inf| stays near 0 for
an unlikely one (CIS, arXiv 2609.32444). The quantiles of eps in each bin of p_inf are therefore the
picture of a gap: the median shows its direction, q25 and q75 its spread, q1 and q99 its tails.

Float32 log-probs near 0 cannot tell 1 - p below 2^-23 from rounding, so 1 - p counts as at least
that.
"""

from __future__ import annotations

import torch

from megatron_rl.objective.gap_figures import bin_names
from megatron_rl.observe.metrics import Histogram

CONFIDENCE_EDGES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)  # of p_inf
CONFIDENCES = bin_names("log_odds", CONFIDENCE_EDGES, "0.9999_to_1", are_integers=False)
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
# Eight bins a decade from 1e-6 to 32 on both sides; the middle bin is symmetric, so that equal
# policies have a median of 0.
_SIZES = tuple(10.0 ** (eighth / 8) for eighth in range(-48, 13))
EDGES = (*(-size for size in reversed(_SIZES)), *_SIZES)
SMALLEST_REST = 2.0**-23


def log_odds_displacement(
    recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor
) -> torch.Tensor:
    """`logit p_train - logit p_inf`.

    Args:
        recomputed_logprobs, rollout_logprobs: [N] float, at most 0.

    Returns:
        [N] float64.
    """
    recomputed, rollout = recomputed_logprobs.double(), rollout_logprobs.double()
    recomputed_rest = (-recomputed.expm1()).clamp(min=SMALLEST_REST)
    rollout_rest = (-rollout.expm1()).clamp(min=SMALLEST_REST)
    return (recomputed - rollout) - (recomputed_rest.log() - rollout_rest.log())


def log_odds_metrics(
    recomputed_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor
) -> dict[str, Histogram]:
    """The histograms `discrepancy/log_odds_0.1_to_0.5` and so on, one for each bin of p_inf, which
    may be empty.

    Args:
        recomputed_logprobs, rollout_logprobs: [N] float of the response tokens, at most 0.
    """
    displacement = log_odds_displacement(recomputed_logprobs, rollout_logprobs)
    confidence = bins_of(rollout_logprobs.double().exp(), CONFIDENCE_EDGES)
    histograms = Histogram.of_groups(
        displacement,
        confidence,
        num_groups=len(CONFIDENCES),
        edges=EDGES,
        quantiles=QUANTILES,
    )
    return {
        f"discrepancy/{name}": histogram
        for name, histogram in zip(CONFIDENCES, histograms, strict=True)
    }


def bins_of(values: torch.Tensor, edges: tuple[float, ...]) -> torch.Tensor:
    """[N] the bin of each value: 0 below the first edge, 1 from the first edge on, and so on."""
    inner = torch.tensor(edges, dtype=values.dtype, device=values.device)
    return torch.bucketize(values, inner, right=True)
