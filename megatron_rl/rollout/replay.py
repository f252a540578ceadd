"""The source that reads rollouts from a recorded run instead of an engine (setting `replay`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl.config.loop import LoopConfig
from megatron_rl.errors import DataError
from megatron_rl.records import ScoredGroup
from megatron_rl.rollout.heads import check_heads, without_heads
from megatron_rl.rollout.recording import read_step
from megatron_rl.rollout.routes import check_routes
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts
from megatron_rl.weights.geometry import Geometry


class ReplaySource:
    """The `RolloutSource` that reads the rollouts and scores that another run recorded.

    Args:
        folder: the other run's `rollouts/`.
        config: gives the number of prompts and samples that a step of this run expects.
        share: given the number of items of all replicas together, returns the index of this
            replica's first item and the number of its items.
        num_logprobs: K of the heads that the rollouts must have; 0: heads are left out.
        routed: the model whose experts the rollouts must tell; None: they need not.
        is_any_order: whether the other run may have used prompts in another order than that of the
            stream, as one does that samples ahead.
    """

    def __init__(
        self,
        folder: Path,
        config: LoopConfig,
        *,
        share: Callable[[int], tuple[int, int]],
        num_logprobs: int = 0,
        routed: Geometry | None = None,
        is_any_order: bool = False,
    ) -> None:
        self._folder = folder
        self._config = config
        self._share = share
        self._num_logprobs = num_logprobs
        self._routed = routed
        self._is_any_order = is_any_order

    def take(self, request: RolloutRequest) -> TakenRollouts:
        """This replica's share of all rollouts that were recorded for `request.step`. With dynamic
        sampling these may be more prompts than requested, because all rounds were recorded. The
        recorded weight versions are not compared with the request's version.

        Raises:
            DataError: the step is missing or damaged, its batch is not the requested one, or its
                rollouts have no heads, or smaller ones.
        """
        groups = read_step(self._folder, request.step)
        self._check(groups, request)
        recorded, where = [each.group for each in groups], f"replay={self._folder}"
        check_heads(recorded, self._num_logprobs, where)
        check_routes(recorded, self._routed, where)
        if not self._num_logprobs:
            groups = without_heads(groups)
        start, count = self._share(len(groups))
        return TakenRollouts(
            groups=tuple(groups[start : start + count]),
            num_prompts=len(groups),
            num_rounds=0,
            is_whole_step=True,
        )

    def _check(self, scored: Sequence[ScoredGroup], request: RolloutRequest) -> None:
        config = self._config
        indices = [each.group.prompt.index for each in scored]
        sizes = [len(each.group.rollouts) for each in scored]
        is_dynamic = config.dynamic_sampling.enabled
        in_order = list(range(request.first_prompt, request.first_prompt + len(scored)))
        is_right = (
            (indices == in_order or self._is_any_order)
            and all(size == config.samples_per_prompt for size in sizes)
            and len(scored) >= config.prompts_per_step
            and (is_dynamic or len(scored) == config.prompts_per_step)
        )
        if not is_right:
            raise DataError(
                f"replay={self._folder}: expected step {request.step} to hold "
                f"{config.prompts_per_step} prompts {'or more ' if is_dynamic else ''}from prompt "
                f"{request.first_prompt} on with {config.samples_per_prompt} samples each "
                "(loop.prompts_per_step, loop.samples_per_prompt, loop.dynamic_sampling), got "
                f"{len(scored)} from prompt {indices[0] if indices else 'none'} on with "
                f"{sizes[0] if sizes else 0}"
            )
