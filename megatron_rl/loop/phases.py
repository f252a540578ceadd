"""The phases of a step with the parts of the run that they need; `train.py` has their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from megatron_rl.loop.acceptance import Acceptance
from megatron_rl.loop.collect import collect_step
from megatron_rl.loop.evaluate import evaluate_sets
from megatron_rl.loop.fixed_gap import measure_fixed_gap
from megatron_rl.loop.parity import ParityProbe
from megatron_rl.loop.parts import Run
from megatron_rl.loop.publish import Publication
from megatron_rl.loop.record import StepEnd, record_rollouts
from megatron_rl.loop.report import write_metrics
from megatron_rl.loop.rest import engines_asleep
from megatron_rl.records import RecomputedRow, SampledStep, StepReport

Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """What a step calls on every rank, in this order; all are collectives over all ranks.

    Example: `phases_of(run).publish()` sends the weights to every
    engine and returns the parity probe's figures.
    """

    collect: Callable[[], SampledStep]  # `collect_step`: rollout, reward, advantage
    asleep: Callable[[], AbstractContextManager[None]]  # `engines_asleep`: around the update
    publish: Callable[[], Figures]  # `Publication.publish`: the weight sync and the parity probe
    acceptance: Acceptance  # of the update
    record: Callable[[int, SampledStep, Iterable[RecomputedRow]], None]  # `record_rollouts`
    evaluate: Callable[..., Figures]  # `evaluate_sets`
    fixed_gap: Callable[[], Figures]  # `measure_fixed_gap`
    report: Callable[..., None]  # `write_metrics`
    end: Callable[[StepReport], bool]  # `StepEnd.finish`: checkpoints; whether to stop here


def phases_of(run: Run) -> Phases:
    """The phases of a run on this rank."""
    learner, state, config, phase = run.learner, run.state, run.config, run.stopwatch.time
    parallel = learner.parallel
    probe = ParityProbe(learner, run.link, config).check
    weights = Publication(learner, run.sender, probe, run.crew, state, config, phase)
    asleep = partial(engines_asleep, run.crew, run.link, learner, config, phase)
    at_the_end = StepEnd(
        learner,
        state,
        config,
        inputs=run.inputs,
        source=run.source,
        writer=run.writer,
        checkpoints=run.checkpoints,
        say=run.recorder.say,
        phase=phase,
        asleep=asleep,
    )
    return Phases(
        collect=partial(
            collect_step, run.source, parallel, state, config, phase, weights.restore, run.failure
        ),
        asleep=asleep,
        publish=weights.publish,
        acceptance=Acceptance(
            learner,
            run.link,
            weights.publish,
            config,
            phase,
            asleep=asleep,
            restore=weights.restore,
        ),
        record=partial(record_rollouts, run.writer, parallel, config, phase),
        evaluate=partial(
            evaluate_sets, run.evaluator, state, config, phase, restore=weights.restore
        ),
        fixed_gap=partial(measure_fixed_gap, learner, run.link, config, phase, weights.restore),
        report=partial(
            write_metrics, run.recorder, run.stopwatch, parallel, run.verifiers, run.meter.measure
        ),
        end=at_the_end.finish,
    )
