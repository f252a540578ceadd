"""Runs that sample ahead (`rollout.max_policy_age` above 0): their source, and what a checkpoint
keeps of it.

A checkpoint says which prompts are used (rollout/ledger.py), so that a resumed run trains on each
prompt once. The groups that were finished and not handed out when it was written are in
`rollouts/ahead/`, in the format of a recorded step and under the step of the checkpoint; a resumed
run takes them instead of sampling them again. Groups that were not finished are sampled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.engine.requests import EnginePool, Sampler
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.exchange import gather_from_all
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.loop.state import LoopState
from megatron_rl.records import Prompt, RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout.buffer import BufferedSource
from megatron_rl.rollout.environment import Environment, EpisodeRequest
from megatron_rl.rollout.heads import check_heads
from megatron_rl.rollout.ledger import joined
from megatron_rl.rollout.live import sample_group
from megatron_rl.rollout.pieces import Pace, PieceSampler
from megatron_rl.rollout.recording import forget_before, has_step, read_step, write_step
from megatron_rl.rollout.routes import check_routes
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.rollout.shelf import Shelf, oldest_version
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.weights.geometry import Geometry

AHEAD = "rollouts/ahead"  # below run_dir


def is_ahead(config: Config) -> bool:
    """Whether the run samples ahead."""
    return config.rollout.max_policy_age > 0 and not config.replay


def ahead_source(
    prompts: Callable[[int, int], Sequence[Prompt]],
    environment: Environment,
    pool: EnginePool,
    score: Callable[[Sequence[RolloutGroup]], Sequence[tuple[Score, ...]]],
    *,
    state: LoopState,
    config: Config,
    parallel: Parallel,
    time: Callable[[str], AbstractContextManager[None]],
    is_changed: bool,
    routed: Geometry | None = None,
) -> BufferedSource:
    """The source of a replica's head, with the groups that the run's checkpoint kept.

    Args:
        state: where the run goes on; its published version is read from the source's thread.
        is_changed: whether settings changed since the checkpoint; then its groups are not used.
        routed: the model whose experts the rollouts must tell; None: they need not.
    """
    rollout, loop = config.rollout, config.loop
    num_logprobs = config.objective.score_centering.num_requested
    pace = Pace(rollout.tokens_per_request, rollout.seconds_per_request)

    async def sample(prompt: Prompt, version: int, sampler: Sampler) -> RolloutGroup:
        if rollout.tokens_per_request or rollout.seconds_per_request:
            sampler = PieceSampler(sampler, pace)
        request = EpisodeRequest(
            num_samples=loop.samples_per_prompt,
            seed=sampling_seed(loop.seed, version + 1, prompt.index),
            sampling=rollout.sampling,
            num_logprobs=num_logprobs,
        )
        group = await sample_group(environment, prompt, request, sampler)
        where = f"environment {type(environment).__name__}"
        check_heads([group], num_logprobs, where)
        check_routes([group], routed, where)
        return group

    shelf = Shelf(
        max_age=rollout.max_policy_age,
        prompts_per_step=parallel.share(loop.prompts_per_step)[1],
        num_steps=loop.num_steps,
        hand_out=rollout.hand_out,
        late_groups=rollout.late_groups,
        last_step=state.step,
    )
    oldest = state.step - rollout.max_policy_age
    kept = [] if is_changed else _read_kept(Path(config.run_dir), state.step)
    return BufferedSource(
        prompts,
        sample,
        pool,
        score,
        shelf=shelf,
        max_age=rollout.max_policy_age,
        indices=state.ledger.unused(parallel.dp_rank, parallel.dp_size),
        kept={
            each.group.prompt.index: each
            for each in kept
            if oldest_version(each, default=state.step) >= oldest
        },
        share=parallel.share,
        version=lambda: state.published_version,
        time=time,
    )


def check_ledger(state: LoopState, config: Config) -> None:
    """Check that a run that does not sample ahead can go on from here.

    Raises:
        ConfigError: prompts after the next one are used.
    """
    if state.ledger.ahead and not is_ahead(config):
        raise ConfigError(
            "rollout.max_policy_age: expected above 0, as in the checkpoint, which has trained on "
            f"{len(state.ledger.ahead)} prompts after its first unused one, "
            f"{state.ledger.first}, got 0"
        )


def save_ahead(
    source: RolloutSource | None, state: LoopState, config: Config, parallel: Parallel
) -> None:
    """Before a checkpoint is written: bring the ledger up to date, on every rank, and write the
    groups that are finished. A collective over all ranks.

    Args:
        source: on the heads of the replicas; None elsewhere.
    """
    ledger = state.ledger
    if isinstance(source, BufferedSource):
        folder = Path(config.run_dir) / AHEAD
        finished = [each.without_judgement() for each in source.finished()]
        write_step(folder, state.step, parallel.dp_rank, finished, num_ranks=parallel.dp_size)
        forget_before(folder, _oldest_checkpoint(Path(config.run_dir), default=state.step))
        used = source.take_used()
        of_all = gather_from_all(used, parallel.host.dp) if parallel.dp_size > 1 else [used]
        ledger = joined(ledger, of_all)
    state.ledger = parallel.from_first_rank(ledger)
    state.next_prompt = state.ledger.first


def _oldest_checkpoint(run_dir: Path, *, default: int) -> int:
    """The step of the oldest checkpoint that is kept."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return min([default, *(int(name.removeprefix("step_")) for name in names)])


def _read_kept(run_dir: Path, step: int) -> list[ScoredGroup]:
    folder = run_dir / AHEAD
    return read_step(folder, step) if has_step(folder, step) else []
