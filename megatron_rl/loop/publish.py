"""The weight sync of train.py: the learner's weights into every engine, and the parity probe.

Rank 0 sends; every rank of the first replica gives its shards; all ranks compute the probe. Nothing
is sampled before `publish_weights` has returned on every rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_rl.config import RolloutConfig
from megatron_rl.errors import SyncError
from megatron_rl.learner.batch.deal import DealtBatch, recomputed_by_sample
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.learner.passes.forward import WHOLE
from megatron_rl.loop.run import SYNC_LOG, Run
from megatron_rl.loop.stations import recompute_for_all, unscored_samples
from megatron_rl.records import Sample
from megatron_rl.rollout.live import sample_groups
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.sync.probe import ParityReport, check_parity
from megatron_rl.sync.wire import TensorSpec
from megatron_rl.weights.quantization import quantized, quantized_shapes

PROBE_PROMPTS = 4  # an engine
PROBE_SAMPLES = 2  # a prompt


def publish_weights(run: Run) -> dict[str, float]:
    """The learner's weights into every engine as version `run.step`; a collective.

    Returns:
        The probe's figures, the same on every rank.
    Raises:
        SyncError: an engine did not get, or does not serve, what the learner holds.
    """
    if run.is_replay:
        return {}
    with run.stations.time("sync"):
        if run.parallel.rank == 0:
            _publish(run)
        else:
            run.learner.give_tensors()
        # Replicas that give no shards are here at once, and must not sample before the update.
        dist.barrier()
        run.published_version = run.step
        return _probe(run) if run.config.sync.probe_num_tokens else {}


def _publish(run: Run) -> None:
    quantization = run.config.rollout.quantization
    shapes = run.learner.tensor_shapes()
    specs = [
        TensorSpec(name=name, dtype=dtype, shape=shape)
        for name, dtype, shape in quantized_shapes(
            quantization, shapes, DTYPES[run.config.model.dtype]
        )
    ]
    tensors = quantized(quantization, run.learner.full_tensors())
    try:
        report = run.publisher.publish(specs, tensors, version=run.step)
    except SyncError:
        run.check_engines_after_failure()
        raise
    line = {
        "version": report.version,
        "bytes": report.num_bytes,
        "published": report.checksum,
        "received": report.received,
        "seconds": report.seconds,
    }
    with (run.run_dir / SYNC_LOG).open("a") as file:
        file.write(json.dumps(line) + "\n")


def _probe(run: Run) -> dict[str, float]:
    """A few samples from every engine, held against the learner's log-probs of the same tokens."""
    samples = _probe_samples(run) if run.parallel.rank == 0 else []
    dealt, recomputed = recompute_for_all(run, samples)
    figures: dict[str, float] = {}
    if run.parallel.is_last_stage:
        reports = _compare_engines(run, dealt, recomputed)
        figures = {
            "sync/probe_gap/mean": max(each.mean_probability_gap for each in reports),
            "sync/probe_gap/max": max(each.max_probability_gap for each in reports),
            "sync/probe_relative_logprob_gap/max": max(
                each.max_relative_logprob_gap for each in reports
            ),
        }
    return run.parallel.from_last_stage(figures)


def _probe_samples(run: Run) -> list[Sample]:
    """Short samples of the first prompts, which the client spreads over engines by index.

    Of the whole distribution: where the run's sampling truncates, rounding now and then takes a
    token at the edge in or out, and all log-probs of that position move by more than rounding.
    """
    num_tokens = math.ceil(run.config.sync.probe_num_tokens / (PROBE_PROMPTS * PROBE_SAMPLES))
    sampling = run.config.rollout.sampling
    prompts = run.stream.prompts(0, PROBE_PROMPTS * len(run.addresses))
    groups = sample_groups(
        run.pool,
        run.environment,
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


def _compare_engines(
    run: Run, dealt: DealtBatch, recomputed: Sequence[torch.Tensor]
) -> list[ParityReport]:
    """One report an engine: pooled, a single stale engine among many would pass."""
    rollout = run.config.rollout
    pairs = recomputed_by_sample(dealt, [recomputed])
    reports = []
    for address in run.addresses:
        own = [pair for pair in pairs if pair[0].rollout.engine == address.url]
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
