"""The source that samples rollouts from the engines: it takes prompts and returns scored groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np

from megatron_rl.config.rollout import SamplingConfig
from megatron_rl.engine.requests import EnginePool, Sampler
from megatron_rl.errors import EngineError
from megatron_rl.records import MAX_SAMPLES, Prompt, RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout.environment import Environment, EpisodeRequest
from megatron_rl.rollout.heads import check_heads
from megatron_rl.rollout.routes import check_routes
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.rollout.source import RolloutRequest, TakenRollouts
from megatron_rl.weights.geometry import Geometry


class LiveSource:
    """The `RolloutSource` that samples rollouts from the engines and scores them.

    Args:
        prompts: returns the prompts for a first index and a number of prompts.
        score: returns the scores of the rollouts of groups, [P] tuples of [G].
        num_samples: rollouts for each prompt.
        seed: the run's seed.
        share: given the number of items of all replicas together, returns the index of this
            replica's first item and the number of its items.
        time: returns a context manager that times the named phase, "rollout" or "reward".
        num_logprobs: K of the rollouts' heads; 0: no heads are requested.
        routed: the model whose experts the rollouts must tell; None: they need not.
    """

    def __init__(
        self,
        prompts: Callable[[int, int], Sequence[Prompt]],
        environment: Environment,
        pool: EnginePool,
        score: Callable[[Sequence[RolloutGroup]], Sequence[tuple[Score, ...]]],
        *,
        sampling: SamplingConfig,
        num_samples: int,
        seed: int,
        share: Callable[[int], tuple[int, int]],
        time: Callable[[str], AbstractContextManager[None]],
        num_logprobs: int = 0,
        routed: Geometry | None = None,
    ) -> None:
        self._prompts = prompts
        self._environment = environment
        self._pool = pool
        self._score = score
        self._sampling = sampling
        self._num_samples = num_samples
        self._seed = seed
        self._share = share
        self._time = time
        self._num_logprobs = num_logprobs
        self._routed = routed
        # what of a request was sampled when too few engines were left, by place in it
        self._begun: tuple[RolloutRequest | None, dict[int, RolloutGroup]] = (None, {})

    def take(self, request: RolloutRequest) -> TakenRollouts:
        """This replica's share of `request.num_prompts` prompts, sampled and scored.

        Raises:
            EnginesLostError: too few engines serve. What was finished is kept for the next call
                with the same request.
            EngineError: an engine failed, or sampled with weights other than the requested ones.
        """
        if self._begun[0] != request:
            self._begun = request, {}
        start, count = self._share(request.num_prompts)
        prompts = self._prompts(request.first_prompt + start, count)
        with self._time("rollout"):
            groups = sample_groups(
                self._pool,
                self._environment,
                prompts,
                self._sampling,
                num_samples=self._num_samples,
                seeds=[sampling_seed(self._seed, request.step, each.index) for each in prompts],
                num_logprobs=self._num_logprobs,
                finished=self._begun[1],
            )
        self._begun = None, {}
        check_versions(groups, request.weight_version)
        where = f"environment {type(self._environment).__name__}"
        check_heads(groups, self._num_logprobs, where)
        check_routes(groups, self._routed, where)
        with self._time("reward"):
            scores = self._score(groups)
        return TakenRollouts(
            groups=tuple(
                ScoredGroup(group=group, scores=tuple(of_group))
                for group, of_group in zip(groups, scores, strict=True)
            ),
            num_prompts=request.num_prompts,
            num_rounds=1,
            is_whole_step=False,
        )


def sample_groups(
    pool: EnginePool,
    environment: Environment,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    num_samples: int,
    seeds: Sequence[int],
    num_logprobs: int = 0,
    finished: dict[int, RolloutGroup] | None = None,
) -> list[RolloutGroup]:
    """Sample `num_samples` rollouts for each prompt; blocks until all of them are complete.

    Args:
        seeds: [P] see `rollout/seeds.py`; rollout j of prompt i is drawn with `seeds[i] + j`.
        num_logprobs: K of the rollouts' heads; 0: no heads.
        finished: see `run_episodes`.

    Returns:
        A group for each prompt, in the order of the prompts.

    Raises:
        EngineError: see `EnginePool.run`.
        ValueError: an argument is invalid, or the environment returned a wrong number of rollouts.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: expected one per prompt, {len(prompts)}, got {len(seeds)}")
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples: expected 1 to {MAX_SAMPLES}, got {num_samples}")
    requests = [
        EpisodeRequest(
            num_samples=num_samples, seed=seed, sampling=sampling, num_logprobs=num_logprobs
        )
        for seed in seeds
    ]
    return run_episodes(pool, environment, prompts, requests, finished)


def run_episodes(
    pool: EnginePool,
    environment: Environment,
    prompts: Sequence[Prompt],
    requests: Sequence[EpisodeRequest],
    finished: dict[int, RolloutGroup] | None = None,
) -> list[RolloutGroup]:
    """The rollouts of each prompt that its request asks for; blocks until all are complete.

    Args:
        requests: [P]
        finished: groups of an earlier call that did not end, by place in `prompts`; they are not
            sampled again. Those that are finished now are added.

    Returns:
        A group for each prompt, in the order of the prompts.

    Raises:
        EngineError: see `EnginePool.run`.
        ValueError: the environment returned a wrong number of rollouts.
    """
    known = {} if finished is None else finished

    async def finish(place: int, sampler: Sampler) -> None:
        known[place] = await sample_group(environment, prompts[place], requests[place], sampler)

    if len(requests) != len(prompts):
        raise ValueError(f"requests: expected {len(prompts)}, got {len(requests)}")
    pool.run([partial(finish, place) for place in range(len(prompts)) if place not in known])
    return [known[place] for place in range(len(prompts))]


async def sample_group(
    environment: Environment, prompt: Prompt, request: EpisodeRequest, sampler: Sampler
) -> RolloutGroup:
    """The rollouts of one prompt that the request asks for.

    Raises:
        EngineError: see `Sampler.generate`.
        ValueError: the environment returned a wrong number of rollouts.
    """
    rollouts = await environment.rollouts(prompt, request, sampler)
    if len(rollouts) != request.num_samples:
        raise ValueError(
            f"environment {type(environment).__name__}: expected {request.num_samples} rollouts of "
            f"prompt {prompt.index}, got {len(rollouts)}"
        )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def check_versions(groups: Sequence[RolloutGroup], expected: int) -> None:
    """Check that every token was sampled by the weights that were published last.

    Raises:
        EngineError: a token was sampled by other weights, because an engine was restarted or
            because another run publishes to it.
    """
    for group in groups:
        for rollout in group.rollouts:
            versions = rollout.weight_versions
            strays = np.unique(versions[(versions != -1) & (versions != expected)]).tolist()
            if strays:
                raise EngineError(
                    f"prompt {group.prompt.index}: expected samples of weight version {expected}, "
                    f"got {strays}; was the engine restarted, or published to by another "
                    "run?"
                )
