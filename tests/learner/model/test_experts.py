"""What a dispatcher of Megatron is told about a row with padding; models are compared elsewhere
(test_build.py, test_preset_layouts.py).
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_rl.learner.model.experts import count_sent_tokens


class Dispatcher:
    """As Megatron's: each position goes to k = 2 experts."""

    def __init__(self) -> None:
        self.num_out_tokens: Any = None
        self.sync_points: list[str] = []

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        self.num_out_tokens = len(routing_map) * 2
        return routing_map.sum(0)

    def _maybe_update_cuda_sync_point(self, point: str) -> None:
        self.sync_points.append(point)


def test_padding_is_not_sent() -> None:
    """Of four positions the last two are padding."""
    dispatcher = Dispatcher()
    count_sent_tokens(dispatcher)
    routing_map = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert dispatcher.preprocess(routing_map).tolist() == [1, 2, 1]
    assert int(dispatcher.num_out_tokens) == 4
    # On a GPU the number is awaited before it divides anything.
    assert dispatcher.sync_points == ["before_permutation_1"]
