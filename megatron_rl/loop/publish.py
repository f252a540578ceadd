"""The weight sync: send the learner's weights to every engine, then run the parity probe.

Rank 0 publishes the weights, every rank of the first replica contributes its shards, and all ranks
take part in the probe. With a transport that has many sources, the first rank of each pipeline
stage sends the tensors of its stage; otherwise rank 0 sends all of them. No rank samples before
`publish_weights` has returned on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.config import Config
from megatron_rl.errors import SyncError
from megatron_rl.learner.batch.deal import unscored_samples
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.loop.link import EngineLink, log_update
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import Sample
from megatron_rl.rollout.live import sample_groups
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.probe import check_engines, engine_precision
from megatron_rl.sync.source import WeightStream, weight_stream
from megatron_rl.sync.transports.transport import has_many_sources

PROBE_PROMPTS = 4  # per engine
PROBE_SAMPLES = 2  # per prompt


def publish_weights(
    learner: Learner,
    link: EngineLink | Contributor | None,
    urls: Sequence[str],
    state: LoopState,
    config: Config,
    phase: Phase,
) -> dict[str, float]:
    """Publish the learner's weights as version `state.step`; a collective over all ranks.

    Args:
        link: on rank 0; on the other sources of the weights their `Contributor`; None on every
            other rank.
        urls: of all engines.

    Returns:
        The probe's figures, the same on every rank. Empty with `sync.probe_num_tokens=0`, or in a
        replay, which has no engines.

    Raises:
        SyncError: an engine did not receive the learner's weights, or does not serve them.
    """
    if config.replay:
        return {}
    with phase("sync"):
        if isinstance(link, EngineLink):
            _publish(learner, link, state.step, config)
        elif isinstance(link, Contributor):
            link.contribute(_stream(learner, config))
        else:
            _give(learner, config)
        # Replicas that send no shards arrive here early, but must not sample before the update.
        learner.parallel.barrier()
        state.published_version = state.step
        if not config.sync.probe_num_tokens:
            return {}
        is_first = isinstance(link, EngineLink)
        samples = _probe_samples(link, state.step, config) if is_first else []
        return _probe(learner, samples, urls, state.step, config)


def _publish(learner: Learner, link: EngineLink, version: int, config: Config) -> None:
    try:
        report = link.publisher.publish(_stream(learner, config), version=version)
    except SyncError:
        link.check_after_failure()
        raise
    log_update(link.log, report)


def _stream(learner: Learner, config: Config) -> WeightStream:
    """The specs of all tensors, and the tensors that this rank sends."""
    is_shared = has_many_sources(config.sync.transport)
    return weight_stream(
        learner.tensor_shapes(),
        learner.owned_tensors() if is_shared else learner.full_tensors(),
        quantization=config.rollout.quantization,
        dtype=DTYPES[config.model.dtype],
        sources=learner.tensor_stages() if is_shared else (),
    )


def _give(learner: Learner, config: Config) -> None:
    """Contribute shards to the sources."""
    if has_many_sources(config.sync.transport):
        for _ in learner.owned_tensors():
            pass
    else:
        learner.give_tensors()


def _probe_samples(link: EngineLink, version: int, config: Config) -> list[Sample]:
    """Short samples of the first prompts, the same number from every engine.

    They are drawn from the whole distribution, even if the run's sampling truncates it: rounding
    may move a token across the edge of a truncated support, and then all log-probs at that position
    would change by more than rounding. Nothing stops them before they have their tokens, except the
    model's own end-of-sequence token.
    """
    num_tokens = math.ceil(config.sync.probe_num_tokens / (PROBE_PROMPTS * PROBE_SAMPLES))
    sampling = config.rollout.sampling
    prompts = link.prompts(0, PROBE_PROMPTS * len(link.pool.urls))
    groups = sample_groups(
        link.pool,
        link.environment,
        prompts,
        replace(
            sampling,
            max_tokens=min(num_tokens, sampling.max_tokens),
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            stop=[],
            stop_token_ids=[],
        ),
        num_samples=PROBE_SAMPLES,
        seeds=[sampling_seed(config.loop.seed, version, prompt.index) for prompt in prompts],
    )
    return unscored_samples(groups)


def _probe(
    learner: Learner,
    samples: Sequence[Sample],
    urls: Sequence[str],
    version: int,
    config: Config,
) -> dict[str, float]:
    """Compare the engines' log-probs of their samples with the learner's for the same tokens."""
    scored = learner.score_samples(samples, tokens_per_row=config.learner.tokens_per_micro_batch)
    figures: dict[str, float] = {}
    if learner.parallel.is_last_stage:
        reports = check_engines(
            scored,
            urls=urls,
            version=version,
            engine_dtype=engine_precision(config.rollout),
            learner_dtype=config.model.dtype,
            tolerance=config.sync.probe_tolerance,
        ).values()
        figures = {
            "sync/probe_gap/mean": max(each.mean_probability_gap for each in reports),
            "sync/probe_gap/max": max(each.max_probability_gap for each in reports),
            "sync/probe_relative_logprob_gap/max": max(
                each.max_relative_logprob_gap for each in reports
            ),
        }
    return learner.parallel.from_last_stage(figures)
