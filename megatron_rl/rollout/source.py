"""The interface from which a training step gets its scored rollouts. `rollout/live.py` samples
them, `rollout/buffer.py` samples them ahead, `rollout/replay.py` reads recorded ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from megatron_rl.observe.metrics import Metric
from megatron_rl.records import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """The rollouts that a training step requests.

    Example: `RolloutRequest(step=3, first_prompt=128, num_prompts=64, weight_version=2)`.
    """

    step: int
    first_prompt: int  # index in the run's stream of prompts
    num_prompts: int  # of all replicas together
    weight_version: int  # of the weights that the engines serve


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenRollouts:
    """One replica's share of the rollouts of a step.

    Example: two replicas, 64 prompts: `TakenRollouts(groups=(ScoredGroup(...), ...),  # 32
    num_prompts=64, num_rounds=1, is_whole_step=False)`.
    """

    groups: tuple[ScoredGroup, ...]  # this replica's share, by prompt index
    num_prompts: int  # of all replicas together
    num_rounds: int  # 1 if they were sampled, 0 if they were read from a recording
    is_whole_step: bool  # True if the source has no further rollouts for this step
    # of this replica, to be reduced over the replicas; the same keys on all of them
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class RolloutSource(Protocol):
    """Provides the scored rollouts of a step on the head of each replica."""

    def take(self, request: RolloutRequest) -> TakenRollouts:
        """This replica's share of the rollouts of a step; blocks until they are scored.

        Raises:
            EngineError: sampling failed, or an engine did not serve the requested weights.
            DataError: the recorded rollouts are missing, or do not match the request.
        """
        ...
