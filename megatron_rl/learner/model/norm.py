"""The RMS norm of the layers, for machines without Transformer Engine.

Megatron-Core's own wrapper of torch's norms refuses sequence parallelism
(transformer/torch_norm.py). The computation is the same; but where each tensor-parallel rank
normalises its own positions of a row, the gradients of the weight must be added over these ranks,
which Megatron does for weights with the attribute `sequence_parallel`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def root_mean_square_norm() -> type:
    """The class that a Megatron layer spec takes as a norm."""

    class RootMeanSquareNorm(torch.nn.RMSNorm):
        """torch's RMSNorm, [..., hidden_size] to the same shape."""

        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
            super().__init__(hidden_size, eps=eps)
            self.weight.sequence_parallel = config.sequence_parallel

    return RootMeanSquareNorm
