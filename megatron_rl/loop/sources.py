"""The source of a replica's rollouts: an earlier run, or engines, which sample when a step asks for
rollouts or ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.engine.requests import EnginePool
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.loop.ahead import ahead_source, is_ahead
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import Prompt, RolloutGroup, Score
from megatron_rl.rollout.environment import Environment
from megatron_rl.rollout.live import LiveSource
from megatron_rl.rollout.replay import ReplaySource
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.weights.geometry import Geometry


def replay_source(config: Config, parallel: Parallel, *, routed: Geometry | None) -> ReplaySource:
    """The rollouts of the run that `replay` names.

    Args:
        routed: the model whose experts the rollouts must tell; None: they need not.
    """
    return ReplaySource(
        Path(config.replay),
        config.loop,
        share=parallel.share,
        num_logprobs=config.objective.score_centering.num_requested,
        routed=routed,
        is_any_order=config.rollout.max_policy_age > 0,
    )


def sampling_source(
    prompts: Callable[[int, int], Sequence[Prompt]],
    environment: Environment,
    pool: EnginePool,
    score: Callable[[Sequence[RolloutGroup]], Sequence[tuple[Score, ...]]],
    *,
    state: LoopState,
    config: Config,
    parallel: Parallel,
    time: Phase,
    is_changed: bool,
    stack: ExitStack,
    routed: Geometry | None,
) -> RolloutSource:
    """
    Args:
        state: where the run starts or goes on.
        is_changed: whether settings changed since the checkpoint from which it goes on.
        stack: ends the source with the run.
        routed: the model whose experts the rollouts must tell; None: they need not.
    """
    if is_ahead(config):
        return stack.enter_context(
            ahead_source(
                prompts,
                environment,
                pool,
                score,
                state=state,
                config=config,
                parallel=parallel,
                time=time,
                is_changed=is_changed,
                routed=routed,
            )
        )
    return LiveSource(
        prompts,
        environment,
        pool,
        score,
        sampling=config.rollout.sampling,
        num_samples=config.loop.samples_per_prompt,
        seed=config.loop.seed,
        share=parallel.share,
        time=time,
        num_logprobs=config.objective.score_centering.num_requested,
        routed=routed,
    )
