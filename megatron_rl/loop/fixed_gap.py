"""The discrepancy between learner and engines on one fixed set of rollouts.

The gap on a run's own samples shrinks as the policy becomes more certain, with or without a
constraint, because likelier tokens have smaller gaps. On a recorded set (`eval.fixed_rollouts`, the
`rollouts/` folder of another run), learner and engines compute the probabilities of the same tokens
at every evaluation, so that two runs, or two steps of one run, can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.config.evaluation import FIXED_STEP
from megatron_rl.engine.requests import EnginePool
from megatron_rl.learner.batch.deal import unscored_samples
from megatron_rl.learner.learner import Learner
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.restore import Restore, ask_engines, no_engines_to_restore
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import Sample
from megatron_rl.rollout.recording import read_step


def measure_fixed_gap(
    learner: Learner,
    link: EngineLink | None,
    config: Config,
    phase: Phase,
    restore: Restore = no_engines_to_restore,
) -> dict[str, float]:
    """The gap on the fixed set at the current weights. A collective over all ranks; the engines
    must already serve these weights.

    Args:
        link: on rank 0; None on every other rank.
        restore: see `loop/restore.py`.

    Returns:
        `eval/fixed_gap/mean` and `/max` of |p_train - p_inf|, and `eval/fixed_logprob/mean`, the
        learner's mean log-prob, which shows how the policy has moved on the set. The figures are
        the same on every rank. Empty if there is no set, or in a replay, which has no engines.

    Raises:
        EngineError: an engine did not score the sequences that it was sent.
    """
    if config.replay or not config.eval.fixed_rollouts:
        return {}

    def ask() -> list[Sample]:
        return [] if link is None else _scored_by_engines(link.pool, config)

    samples = ask_engines(ask, restore, partial(phase, "eval")) or []
    with phase("eval"):
        tokens_per_row = config.learner.tokens_per_micro_batch
        scored = learner.score_samples(samples, tokens_per_row=tokens_per_row)
        figures = gap_figures(scored) if learner.parallel.is_last_stage else {}
        return learner.parallel.from_last_stage(figures)


def gap_figures(scored: Sequence[tuple[Sample, torch.Tensor]]) -> dict[str, float]:
    """The figures of `measure_fixed_gap`.

    Args:
        scored: samples with the engines' log-probs, each with the learner's log-probs of the same
            tokens, [L].
    """
    gaps, logprobs = [], []
    for sample, learned in scored:
        is_sampled = torch.from_numpy(sample.rollout.loss_mask)
        served = torch.from_numpy(sample.rollout.rollout_logprobs).float()[is_sampled]
        gaps.append(discrepancy(learned[is_sampled], served).double())
        logprobs.append(learned[is_sampled].double())
    return {
        "eval/fixed_gap/mean": float(torch.cat(gaps).mean()),
        "eval/fixed_gap/max": float(torch.cat(gaps).max()),
        "eval/fixed_logprob/mean": float(torch.cat(logprobs).mean()),
    }


def _scored_by_engines(pool: EnginePool, config: Config) -> list[Sample]:
    """The recorded samples, with the log-probs that the engines assign to their tokens now."""
    recorded = read_step(Path(config.eval.fixed_rollouts), FIXED_STEP)
    samples = unscored_samples([each.group for each in recorded])[: config.eval.num_fixed_rollouts]
    logprobs = pool.score([sample.rollout.token_ids.tolist() for sample in samples])
    return [
        replace(sample, rollout=replace(sample.rollout, rollout_logprobs=each))
        for sample, each in zip(samples, logprobs, strict=True)
    ]
