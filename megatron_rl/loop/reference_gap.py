"""One fixed set of trajectories in, how far learner and engine are apart on it out.

The gap of a run's own samples falls as the policy sharpens, whatever is done about it: likelier
tokens have smaller gaps. On recorded trajectories (`eval.reference_rollouts`, another run's
`rollouts/` folder) both sides give the probability of the same tokens at every evaluation, so that
two runs, or two moments of one, can be compared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_rl.learner.batch.deal import recomputed_by_sample
from megatron_rl.loop.preflight import REFERENCE_STEP
from megatron_rl.loop.run import Run
from megatron_rl.loop.stations import recompute_for_all, unscored_samples
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.records import Sample
from megatron_rl.rollout.recording import read_step


def reference_gap(run: Run) -> dict[str, float]:
    """The gap over the set at the present weights, which the engines must serve; a collective.

    Returns:
        `eval/reference_gap/mean` and `/max` of |p_train - p_inf|, and
        `eval/reference_logprob/mean`, the learner's, which tells how the policy has moved on the
        set; the same on every rank, empty without a set.
    Raises:
        EngineError: an engine did not score what it was given.
    """
    if not run.config.eval.reference_rollouts or run.is_replay:
        return {}
    with run.stations.time("eval"):
        samples = _scored_by_engine(run) if run.parallel.rank == 0 else []
        dealt, recomputed = recompute_for_all(run, samples)
        figures: dict[str, float] = {}
        if run.parallel.is_last_stage:
            gaps, logprobs = [], []
            for sample, learned in recomputed_by_sample(dealt, [recomputed]):
                is_sampled = torch.tensor(sample.rollout.loss_mask)
                served = torch.tensor(sample.rollout.rollout_logprobs)[is_sampled]
                gaps.append(discrepancy(learned[is_sampled], served).double())
                logprobs.append(learned[is_sampled].double())
            figures = {
                "eval/reference_gap/mean": float(torch.cat(gaps).mean()),
                "eval/reference_gap/max": float(torch.cat(gaps).max()),
                "eval/reference_logprob/mean": float(torch.cat(logprobs).mean()),
            }
        return run.parallel.from_last_stage(figures)


def _scored_by_engine(run: Run) -> list[Sample]:
    """The recorded samples, with what the engines give their tokens now."""
    recorded = read_step(Path(run.config.eval.reference_rollouts), REFERENCE_STEP)
    samples = unscored_samples([each.group for each in recorded])[: run.config.eval.num_reference]
    scores = run.pool.score([sample.rollout.token_ids for sample in samples])
    return [
        replace(sample, rollout=replace(sample.rollout, rollout_logprobs=logprobs))
        for sample, logprobs in zip(samples, scores, strict=True)
    ]
