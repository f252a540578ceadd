"""The ratio of two sums over sequences, and its standard error.

    R = sum_g a_g / sum_g b_g          se^2 = G / (G - 1) * sum_g (a_g - R b_g)^2 / (sum_g b_g)^2

Tokens of one sequence depend on each other, so the G sequences are the units that vary
independently (the ratio estimator of cluster sampling: Cochran, Sampling Techniques, 1977, 6.3). A
mean over tokens is the ratio with the numbers of tokens as b.
"""

from __future__ import annotations

import math

import torch

STANDARD_ERRORS = 4.0  # a finding is certain if it is so far from its bound


def ratio(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """R and its standard error, which is infinite with fewer than two sequences or if the
    denominators add up to 0.

    Args:
        numerators, denominators: [G] floating-point, the sums of each sequence.
    """
    count, total = numerators.numel(), float(denominators.double().sum())
    if total == 0.0:
        return 0.0, math.inf
    value = float(numerators.double().sum()) / total
    if count < 2:
        return value, math.inf
    squares = float((numerators.double() - value * denominators.double()).square().sum())
    return value, math.sqrt(squares * count / (count - 1)) / total
