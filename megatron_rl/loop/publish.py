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

from megatron_rl.engine.client import sampling_seed
from megatron_rl.errors import SyncError
from megatron_rl.learner.batch.deal import DealtBatch, recomputed_by_sample
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.learner.passes.forward import WHOLE
from megatron_rl.loop.run import SYNC_LOG, Run
from megatron_rl.loop.stations import recompute_for_all, unscored_samples
from megatron_rl.records import Sample
from megatron_rl.sync.probe import ParityReport, check_engines, engine_precision
from megatron_rl.sync.source import weight_stream

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
    stream = weight_stream(
        run.learner.tensor_shapes(),
        run.learner.full_tensors(),
        quantization=run.config.rollout.quantization,
        dtype=DTYPES[run.config.model.dtype],
    )
    try:
        report = run.publisher.publish(stream, version=run.step)
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


def _compare_engines(
    run: Run, dealt: DealtBatch, recomputed: Sequence[torch.Tensor]
) -> list[ParityReport]:
    """A report per engine; the client sends prompt i to engine i modulo their number."""
    urls = [address.url for address in run.addresses]
    pairs = [
        (
            replace(
                sample,
                rollout=replace(sample.rollout, engine=urls[sample.prompt_index % len(urls)]),
            ),
            values,
        )
        for sample, values in recomputed_by_sample(dealt, [recomputed])
    ]
    reports = check_engines(
        pairs,
        urls=urls,
        version=run.step,
        engine_dtype=engine_precision(run.config.rollout),
        learner_dtype=run.config.model.dtype,
        tolerance=run.config.sync.probe_tolerance,
    )
    return list(reports.values())
