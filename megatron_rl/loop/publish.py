"""The weight sync: the learner's weights into every engine, then the parity probe.

Rank 0 sends, every rank of the first replica gives its shards, and all ranks compute the probe.
Nothing is sampled before `publish_weights` has returned on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.config import Config
from megatron_rl.errors import SyncError
<<<<<<< HEAD
from megatron_rl.learner.learner import Learner
from megatron_rl.loop.link import EngineLink, log_update
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.stopwatch import Phase
=======
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.learner.passes.forward import WHOLE
from megatron_rl.loop.run import SYNC_LOG, Run
from megatron_rl.loop.stations import unscored_samples
>>>>>>> d-learner
from megatron_rl.records import Sample
from megatron_rl.rollout.live import sample_groups, unscored_samples
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.sync.probe import check_engines, engine_precision
from megatron_rl.sync.source import weight_stream

PROBE_PROMPTS = 4  # an engine
PROBE_SAMPLES = 2  # a prompt


def publish_weights(
    learner: Learner, link: EngineLink | None, state: LoopState, config: Config, phase: Phase
) -> dict[str, float]:
    """Publish the learner's weights as version `state.step`; a collective over all ranks.

    Args:
        link: on rank 0; None on every other rank.

    Returns:
        The probe's figures, the same on every rank; empty with `sync.probe_num_tokens=0`, and in a
        replay, which has no engines.

    Raises:
        SyncError: an engine did not receive, or does not serve, what the learner holds.
    """
    if config.replay:
        return {}
    with phase("sync"):
        if link is not None:
            _publish(learner, link, state.step, config)
        else:
            learner.give_tensors()
        # Replicas that give no shards arrive early, and must not sample before the update.
        learner.parallel.barrier()
        state.published_version = state.step
        if not config.sync.probe_num_tokens:
            return {}
        samples = [] if link is None else _probe_samples(link, state.step, config)
        return _probe(learner, samples, state.step, config)


def _publish(learner: Learner, link: EngineLink, version: int, config: Config) -> None:
    stream = weight_stream(
        learner.tensor_shapes(),
        learner.full_tensors(),
        quantization=config.rollout.quantization,
        dtype=learner.dtype,
    )
    try:
        report = link.publisher.publish(stream, version=version)
    except SyncError:
        link.check_after_failure()
        raise
    log_update(link.log, report)


<<<<<<< HEAD
def _probe_samples(link: EngineLink, version: int, config: Config) -> list[Sample]:
    """Short samples of the first prompts, as many from every engine.

    They are drawn from the whole distribution. Where the run's sampling truncates it, rounding may
    move a token over the edge of the support, and then all log-probs of that position change by
    more than rounding.
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
        ),
        num_samples=PROBE_SAMPLES,
        seeds=[sampling_seed(config.loop.seed, version, prompt.index) for prompt in prompts],
    )
    return unscored_samples(groups)


def _probe(
    learner: Learner, samples: Sequence[Sample], version: int, config: Config
) -> dict[str, float]:
    """Compare the engines' log-probs of their samples with the learner's of the same tokens."""
    scored = learner.score_samples(samples, tokens_per_row=config.learner.tokens_per_micro_batch)
    figures: dict[str, float] = {}
    if learner.parallel.is_last_stage:
        reports = check_engines(
            scored,
            version=version,
            engine_dtype=engine_precision(config.rollout),
            learner_dtype=config.model.dtype,
            tolerance=config.sync.probe_tolerance,
        )
=======
def _probe(run: Run) -> dict[str, float]:
    """A few samples from every engine, held against the learner's log-probs of the same tokens."""
    samples = _probe_samples(run) if run.parallel.rank == 0 else []
    tokens_per_row = run.config.learner.tokens_per_micro_batch
    scored = run.learner.score_samples(samples, tokens_per_row=tokens_per_row)
    figures: dict[str, float] = {}
    if run.parallel.is_last_stage:
        reports = _compare_engines(run, scored)
>>>>>>> d-learner
        figures = {
            "sync/probe_gap/mean": max(each.mean_probability_gap for each in reports),
            "sync/probe_gap/max": max(each.max_probability_gap for each in reports),
            "sync/probe_relative_logprob_gap/max": max(
                each.max_relative_logprob_gap for each in reports
            ),
        }
<<<<<<< HEAD
    return learner.parallel.from_last_stage(figures)
=======
    return run.parallel.from_last_stage(figures)


def _probe_samples(run: Run) -> list[Sample]:
    """Short samples of the first prompts, which the client spreads over engines by index.

    Of the whole distribution: where the run's sampling truncates, rounding now and then takes a
    token at the edge in or out, and all log-probs of that position move by more than rounding.
    """
    num_tokens = math.ceil(run.config.sync.probe_num_tokens / (PROBE_PROMPTS * PROBE_SAMPLES))
    sampling = run.config.rollout.sampling
    prompts = run.stream.prompts(0, PROBE_PROMPTS * len(run.addresses))
    groups = run.client.generate(
        prompts,
        replace(
            sampling,
            max_tokens=min(num_tokens, sampling.max_tokens),
            top_k=WHOLE.top_k,
            top_p=WHOLE.top_p,
            min_p=WHOLE.min_p,
        ),
        num_samples=PROBE_SAMPLES,
        seeds=[sampling_seed(run.config.loop.seed, run.step, prompt.index) for prompt in prompts],
    )
    return unscored_samples(groups)


def engine_precision(rollout: RolloutConfig) -> str:
    """The least precise of the engine's weights, activations and KV cache, as `sync/probe.py` names
    it.
    """
    number = rollout.quantization.format.removesuffix("_w8a8")
    is_fp8 = number == "fp8" or rollout.kv_cache_dtype.startswith("fp8")
    if number == "int4" or not is_fp8:
        return rollout.dtype if number == "none" else number
    return "fp8"


def _compare_engines(run: Run, pairs: Sequence[tuple[Sample, torch.Tensor]]) -> list[ParityReport]:
    """One report an engine: pooled, a single stale engine among many would pass."""
    rollout = run.config.rollout
    reports = []
    for number, address in enumerate(run.addresses):
        own = [pair for pair in pairs if pair[0].prompt_index % len(run.addresses) == number]
        masks = [torch.tensor(sample.rollout.loss_mask) for sample, _ in own]
        served = [torch.tensor(sample.rollout.rollout_logprobs) for sample, _ in own]
        try:
            report = check_parity(
                torch.cat([values[mask] for values, mask in zip(served, masks)]),
                torch.cat([values[mask] for (_, values), mask in zip(own, masks)]),
                engine_dtype=engine_precision(rollout),
                learner_dtype=run.config.model.dtype,
                tolerance=run.config.sync.probe_tolerance,
            )
        except SyncError as error:
            raise SyncError(f"engine {address.url} after update {run.step}: {error}") from error
        reports.append(report)
    return reports
>>>>>>> d-learner
