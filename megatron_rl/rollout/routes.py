"""The experts that an engine sent the tokens of rollouts to: checked, counted, and as tensors of a
recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from megatron_rl.errors import DataError
from megatron_rl.records import Rollout, RolloutGroup
from megatron_rl.weights.geometry import Geometry

# In a recording: [all tokens with routes, layers, k], and the number of them in each sample.
ROUTES, NUM_ROUTED = "routes", "num_routed_tokens"


def pack_routes(rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """The routes of all rollouts, one after another; empty if there are none. A route takes one
    byte if no expert has a number above 255, otherwise two.
    """
    found = [rollout.routes for rollout in rollouts if rollout.routes is not None]
    if not found:
        return {}
    joined = np.concatenate(found)
    dtype = np.uint8 if joined.max(initial=0) < 256 else np.int16
    counts = [0 if rollout.routes is None else len(rollout.routes) for rollout in rollouts]
    return {ROUTES: torch.from_numpy(joined.astype(dtype)), NUM_ROUTED: torch.tensor(counts)}


def split_routes(tensors: dict[str, torch.Tensor], num_samples: int) -> list[np.ndarray | None]:
    """The routes of each sample of a recording."""
    if ROUTES not in tensors:
        return [None] * num_samples
    pieces = tensors[ROUTES].split(tensors[NUM_ROUTED].tolist())
    return [piece.numpy() if len(piece) else None for piece in pieces]


def route_bytes(rollouts: Iterable[Rollout]) -> list[int]:
    """The bytes of the routes of each rollout that has some, as they are held."""
    return [rollout.routes.nbytes for rollout in rollouts if rollout.routes is not None]


def check_routes(groups: Iterable[RolloutGroup], geometry: Geometry | None, where: str) -> None:
    """Check that every rollout has the experts of each token but the last.

    Args:
        geometry: of the model that takes them; None: nothing is checked.
        where: the beginning of an error message.

    Raises:
        DataError: a rollout has no routes, of other tokens, layers or experts.
    """
    if geometry is None or geometry.experts is None:
        return
    experts = geometry.experts
    for group in groups:
        for rollout in group.rollouts:
            if not rollout.num_response_tokens:
                continue
            wanted = (len(rollout.token_ids) - 1, geometry.num_layers, experts.num_chosen)
            found = None if rollout.routes is None else rollout.routes.shape
            if found != wanted:
                raise DataError(
                    f"{where}, prompt {group.prompt.index}: expected the experts of "
                    f"[{', '.join(map(str, wanted))}] tokens, layers and choices "
                    "(learner.moe.routing_replay=rollout), got "
                    f"{'none' if found is None else list(found)}; start the engines with "
                    "--enable-return-routed-experts, or set learner.moe.routing_replay"
                )
            numbers = rollout.routes
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < experts.num_experts:
                raise DataError(
                    f"{where}, prompt {group.prompt.index}: expected experts from 0 to "
                    f"{experts.num_experts - 1}, got {numbers.min()} to {numbers.max()}"
                )
