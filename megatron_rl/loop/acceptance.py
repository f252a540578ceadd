"""Takes an update back if it makes the engine's policy worse than the learner's (MIPU, arXiv
2606.29526; `objective.acceptance`).

    copy the state -> update -> publish -> the engines and the learner score samples of the step
        -> accept, or restore the state and publish again

What is taken back are the weights, the optimizer's moments and the position in the schedule. Lambda
keeps its dual step, because it was taken with the gap before the update, which is measured in any
case. A checkpoint of the step holds the state after the decision, so a resumed run is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from megatron_rl.config import Config
from megatron_rl.learner.batch.deal import sample_key
from megatron_rl.learner.layout.exchange import gather_from_all
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.restore_point import RestorePoint
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.restore import Restore, ask_engines, no_engines_to_restore
from megatron_rl.objective.acceptance import weighted_objective
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.records import Sample, SampledStep

# The engines' new log-probs of a sample, [L], by (prompt index, sample index).
Served = dict[tuple[int, int], tuple[float, ...]]


class Acceptance:
    """The copy of the learner's state before an update, and the decision after its publication.
    Every rank has one; it does nothing unless `objective.acceptance.enabled` is set.
    """

    def __init__(
        self,
        learner: Learner,
        link: EngineLink | None,
        publish: Callable[[], dict[str, float]],
        config: Config,
        phase: Phase,
        *,
        asleep: Callable[[], AbstractContextManager[None]],
        restore: Restore = no_engines_to_restore,
        restore_point: RestorePoint | None = None,
    ) -> None:
        """
        Args:
            link: on rank 0; None on every other rank.
            publish: publishes the learner's weights under the step's version; a collective.
            asleep: the context in which the optimizer's state is on the device (rest.py); a
                collective.
            restore: see `loop/restore.py`.
            restore_point: None: one of the learner's training model, if this is enabled.
        """
        self._learner, self._link, self._publish = learner, link, publish
        self._config, self._asleep, self._restore = config, asleep, restore
        self._timed = partial(phase, "acceptance")
        self._restore_point = restore_point
        if restore_point is None and config.objective.acceptance.enabled:
            self._restore_point = RestorePoint(learner.trained)

    def copy_state(self) -> None:
        """Copy what the next update changes; while the engines sleep."""
        if self._restore_point is not None:
            with self._timed():
                self._restore_point.copy()

    def decide(self, sampled: SampledStep) -> dict[str, float]:
        """Accept the update that has just been published, or take it back and publish again. A
        collective over all ranks, which decide alike.

        Args:
            sampled: the step's rollouts; read on the heads of the replicas.

        Returns:
            `acceptance/learner_objective/mean` and `acceptance/engine_objective/mean`, the
            estimates of J; `acceptance/loss`, their difference; and `acceptance/is_taken_back`, 1
            or 0; then also the figures of the second publication. Without a kept sample only
            `acceptance/is_taken_back`, as 0. Empty if this is not enabled.

        Raises:
            EngineError: an engine did not score the sequences that it was sent.
            SyncError: an engine did not receive the old weights, or does not serve them.
        """
        if self._restore_point is None:
            return {}
        settings = self._config.objective.acceptance
        with self._timed():
            samples = first_kept(sampled.samples(), settings.num_samples, self._learner.parallel)
        served = ask_engines(partial(self._ask, samples), self._restore, self._timed)
        with self._timed():
            figures = self._estimates(samples, served or {})
            loss = figures.get("acceptance/loss")
            # Written so that a loss that is not a number is above the bound.
            is_worse = loss is not None and not loss <= settings.max_loss
            figures["acceptance/is_taken_back"] = float(is_worse)
            if not is_worse:
                return figures
            with self._asleep():
                self._restore_point.restore()
        return figures | self._publish()

    def _ask(self, samples: Sequence[Sample]) -> Served:
        """The engines' log-probs; {} on ranks that do not ask them."""
        if self._link is None:
            return {}
        scores = self._link.pool.score([each.rollout.token_ids.tolist() for each in samples])
        return {sample_key(each): values for each, values in zip(samples, scores, strict=True)}

    def _estimates(self, samples: Sequence[Sample], served: Served) -> dict[str, float]:
        """The estimates of J, rank 0's on every rank: rounding may differ between replicas."""
        parallel, config = self._learner.parallel, self._config
        settings = config.objective.acceptance
        served = parallel.from_first_rank(served)
        if not served:
            return {}
        scored = self._learner.score_samples(
            samples, tokens_per_row=config.learner.tokens_per_micro_batch
        )
        figures = estimates(scored, served, cap=settings.cap) if parallel.is_last_stage else {}
        return parallel.from_first_rank(parallel.from_last_stage(figures))


def first_kept(samples: Sequence[Sample], limit: int, parallel: Parallel) -> list[Sample]:
    """The first kept samples of all replicas that have a response, in order of their prompts; the
    same in every layout. A collective over the heads of the replicas, which hold the samples.

    Args:
        samples: this replica's own; nothing on ranks that are not the head of a replica.
    """
    own = [each for each in samples if each.is_kept and each.rollout.num_response_tokens][:limit]
    of_all = gather_from_all(own, parallel.host.dp) if parallel.dp_size > 1 else [own]
    return sorted((each for part in of_all for each in part), key=sample_key)[:limit]


def estimates(
    scored: Sequence[tuple[Sample, torch.Tensor]], served: Served, *, cap: float
) -> dict[str, float]:
    """The estimates of J, and their difference.

    Args:
        scored: samples with the learner's new log-probs of their tokens, [L].
        served: the engines' new log-probs of the same tokens.
    """
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for sample, learned in scored:
        is_sampled = torch.from_numpy(sample.rollout.loss_mask)
        of_tokens = (
            learned,
            torch.tensor(served[sample_key(sample)], dtype=torch.float32),
            torch.from_numpy(sample.rollout.rollout_logprobs).float(),
            torch.full((len(is_sampled),), sample.advantage),
        )
        for column, values in zip(columns, of_tokens, strict=True):
            column.append(values[is_sampled])
    learner, engine, rollout, advantages = map(torch.cat, columns)
    of_learner = weighted_objective(learner, rollout, advantages, cap=cap)
    of_engine = weighted_objective(engine, rollout, advantages, cap=cap)
    return {
        "acceptance/learner_objective/mean": of_learner,
        "acceptance/engine_objective/mean": of_engine,
        "acceptance/loss": of_learner - of_engine,
    }
