"""The discrepancy between learner and engine on a fixed set of recorded rollouts.

The discrepancy of a run's own samples falls as the policy sharpens, whatever the constraint does,
because likely tokens have smaller gaps. On recorded rollouts (`eval.fixed_rollouts`, the
`rollouts/` folder of another run) both sides score the same tokens at every evaluation, so two
runs, or two steps of one run, can be compared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_rl.learner.batch.deal import recomputed_by_sample
from megatron_rl.loop.preflight import FIXED_STEP
from megatron_rl.loop.run import Run
from megatron_rl.loop.stations import recompute_for_all, unscored_samples
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.records import Sample
from megatron_rl.rollout.recording import read_step


def fixed_gap(run: Run) -> dict[str, float]:
    """The gap on the fixed rollouts at the current weights, which the engines must already serve.

    A collective: every rank calls it.

    Returns:
        `eval/fixed_gap/mean` and `/max` of |p_train - p_inf|, and `eval/fixed_logprob/mean` of the
        learner's log-probs, which shows how far the policy has moved on these tokens. The same on
        every rank; empty if `eval.fixed_rollouts` is not set.
    Raises:
        EngineError: an engine did not score a sequence.
    """
    if not run.config.eval.fixed_rollouts or run.is_replay:
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
                "eval/fixed_gap/mean": float(torch.cat(gaps).mean()),
                "eval/fixed_gap/max": float(torch.cat(gaps).max()),
                "eval/fixed_logprob/mean": float(torch.cat(logprobs).mean()),
            }
        return run.parallel.from_last_stage(figures)


def _scored_by_engine(run: Run) -> list[Sample]:
    """The recorded samples, with the log-probs that the engines give their tokens now."""
    groups, _ = read_step(Path(run.config.eval.fixed_rollouts), FIXED_STEP)
    samples = unscored_samples(groups)[: run.config.eval.num_fixed_rollouts]
    scores = run.client.score([sample.rollout.token_ids for sample in samples])
    return [
        replace(sample, rollout=replace(sample.rollout, rollout_logprobs=logprobs))
        for sample, logprobs in zip(samples, scores, strict=True)
    ]
