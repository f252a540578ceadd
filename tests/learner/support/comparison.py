"""What tests compare of two outcomes of step_ranks.py, and how closely."""

from __future__ import annotations

from typing import Any

import torch

LOSS_TOLERANCE = 1e-6  # of mean |A'|
GRADIENT_TOLERANCE = 1e-5  # relative norm, tensor by tensor
DISCREPANCY_TOLERANCE = 1e-6
# Of max(1, the figure): squared ratios of whole sequences amplify the float32 rounding of log-probs
# between layouts, on one kind of CPU more than on another.
FIGURE_TOLERANCE = 4e-6

Outcomes = dict[str, dict[str, Any]]  # by the name of the case


def relative_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference, relative to the right one's."""
    difference = (left.double() - right.double()).norm() / right.double().norm()
    return float(difference)


def metrics_of(outcome: dict[str, Any]) -> dict[str, float]:
    """Those that rank 0 reported."""
    return outcome["reports"][0].metrics
