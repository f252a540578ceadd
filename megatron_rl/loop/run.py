"""Starts a run: engines, learner, prompts, scorer, publisher and recorder, each on the ranks that
need it.

Settings, data and checkpoint are checked before any process is started (preflight.py). The engines
start first and load their model while the learner loads its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rl.config import Config, RewardTerm
from megatron_rl.config.file import replaced_keys
from megatron_rl.data.evaluation_sets import questions_of
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.health import seconds_of_silence
from megatron_rl.engine.load import EngineLoad
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.roster import Roster
from megatron_rl.learner.layout.deterministic import use_deterministic_algorithms
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.learner.model.checkpoint import load_checkpoint
from megatron_rl.learner.model.checkpoint_files import FOLDER, latest_checkpoint
from megatron_rl.learner.model.checkpoint_writer import CheckpointWriter
from megatron_rl.loop.ahead import check_ledger, is_ahead
from megatron_rl.loop.crew import Crew
from megatron_rl.loop.engines import RunEngines
from megatron_rl.loop.environments import make_environment, single_turn
from megatron_rl.loop.evaluate import Evaluator
from megatron_rl.loop.expected import MAX_ANSWERS, check_own_functions, try_expected_answers
from megatron_rl.loop.folder import SYNC_LOG, forget_later_steps, prepare_folder
from megatron_rl.loop.inputs import Inputs
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.machine import Meter
from megatron_rl.loop.preflight import Preflight, preflight, truncation_of
from megatron_rl.loop.resume import (
    Resumption,
    check_unfinished,
    plan_resumption,
    verify_resumption,
)
from megatron_rl.loop.sources import replay_source, sampling_source
from megatron_rl.loop.start_lines import starting_line
from megatron_rl.loop.state import LoopState, initial_state
from megatron_rl.loop.verifiers import verifier_keys_of
from megatron_rl.observe.recorder import Recorder
from megatron_rl.observe.stopwatch import Stopwatch
from megatron_rl.process.beats import Beats
from megatron_rl.process.command import Progress
from megatron_rl.process.node import this_node
from megatron_rl.reward.score import Scorer
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.rollout.writer import RolloutWriter
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.sources import Sources
from megatron_rl.sync.transports.transport import has_many_sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a run on one rank; parts that this rank does not need are None.

    Example: rank 1 of 2 with TP=2 holds `Run(config=Config(...), learner=Learner(...),
    state=LoopState(...), recorder=Recorder(...), writer=RolloutWriter(...),
    stopwatch=Stopwatch(...), verifiers={"chain_sum": (RewardTerm(verifier="exact"),)},
    crew=Crew(...), inputs={...}, was_resumed=False, source=None, evaluator=None, link=None,
    contributor=None, meter=Meter(...), scorer=None, checkpoints=CheckpointWriter(...))`.
    """

    config: Config
    learner: Learner
    state: LoopState
    recorder: Recorder  # writes only on rank 0
    writer: RolloutWriter  # writes on the ranks that hold rollouts or their log-probs
    stopwatch: Stopwatch
    # by the name of the task or file that prompts come from
    verifiers: Mapping[str, tuple[RewardTerm, ...]]
    crew: Crew | None  # on every rank, unless rollouts are replayed
    inputs: Inputs  # are saved with every checkpoint
    was_resumed: bool  # from a checkpoint
    source: RolloutSource | None  # on the heads of the replicas
    evaluator: Evaluator | None  # on the heads of the replicas, unless rollouts are replayed
    link: EngineLink | None  # on rank 0, unless rollouts are replayed
    contributor: Contributor | None  # on the other sources of the weights
    meter: Meter  # of the machines' use
    scorer: Scorer | None  # on the heads of the replicas, unless rollouts are replayed
    checkpoints: CheckpointWriter

    @property
    def sender(self) -> EngineLink | Contributor | None:
        """What this rank publishes weights with; None if it sends none."""
        return self.link or self.contributor

    def failure(self) -> str:
        """What a verifier failed on last, on this rank; "" if nothing is known."""
        return self.scorer.last_failure if self.scorer else ""


@contextmanager
def start_run(config: Config, progress: Progress) -> Iterator[Run]:
    """Start what this rank needs and end it afterwards.

    Raises:
        ConfigError, DataError: the settings, the data or the checkpoint cannot be used.
        EngineError: an engine does not start. NothingToDo: the run is finished.
    """
    checked = preflight(config)
    planned = plan_resumption(config, checked.inputs)
    check_unfinished(config, planned)
    run_dir, is_first = Path(config.run_dir), int(os.environ.get("RANK", "0")) == 0
    state = initial_state(config.objective.constraint)
    # No phase is entered before there is a recorder.
    stopwatch = Stopwatch(on_enter=lambda phase: recorder.phase(phase))
    progress.describe = partial(_describe, run_dir, state, stopwatch)
    with ExitStack() as stack:
        engines = RunEngines(config, this_node(), stack, say=lambda line: recorder.say(line))
        if is_first:
            prepare_folder(config, run_dir)
            if not config.replay:
                engines.start_first()
            print(starting_line(config), flush=True)  # the models load for up to minutes
        if config.model.kernels.deterministic:
            use_deterministic_algorithms()
        parallel = initialize_parallel(config.parallel, seed=config.loop.seed)
        if not config.replay:
            engines.start_others(parallel)
        place = partial(_place, state, stopwatch)
        beats = Beats(run_dir, rank=parallel.rank, num_ranks=parallel.world_size, place=place)
        progress.meet(stack.enter_context(beats))
        # Not after an error: the other ranks would see a closed connection and report that first.
        stack.push(lambda kind, *_: shut_down_parallel() if kind is None else None)
        resumption = verify_resumption(planned, checked.inputs, parallel)
        learner = _build_learner(config, checked, parallel)
        _load(resumption, learner, state, config, is_first=is_first)
        recorder = stack.enter_context(_recorder(config, resumption, parallel, state))
        writer = stack.enter_context(_writer(config))
        scorer, tried = _scorer(config, checked, parallel, stack)
        addresses = [] if config.replay else engines.addresses(parallel)
        roster = Roster([address.url for address in addresses], config.rollout.min_engines)
        source, evaluator, link = _connect(
            config,
            checked,
            parallel,
            stopwatch,
            scorer,
            addresses,
            state=state,
            is_changed=bool(resumption.changes),
            engines=engines,
            roster=roster,
            stack=stack,
        )
        crew = None
        if not config.replay:
            crew = Crew(engines, addresses, roster, parallel, config.rollout, recorder.say)
        contributor = None if link else _contributor(config, parallel, stack)
        meter = _meter(config, learner, addresses, stack)
        told = resumption.told(state.step, state.next_prompt)
        for line in (*told, *_parts_of(learner, config), *tried, *filter(None, [meter.omission])):
            recorder.say(line)
        yield Run(
            config=config,
            learner=learner,
            state=state,
            recorder=recorder,
            writer=writer,
            stopwatch=stopwatch,
            verifiers=checked.verifiers,
            crew=crew,
            inputs=checked.inputs,
            was_resumed=resumption.checkpoint is not None,
            source=source,
            evaluator=evaluator,
            link=link,
            contributor=contributor,
            meter=meter,
            scorer=scorer,
            checkpoints=_checkpoints(config, learner),
        )


def _load(
    resumption: Resumption, learner: Learner, state: LoopState, config: Config, *, is_first: bool
) -> None:
    """Load the checkpoint, if there is one; rank 0 deletes the records of later steps."""
    if resumption.checkpoint is not None:
        state.load_state_dict(load_checkpoint(resumption.checkpoint, learner.trained))
        check_ledger(state, config)
    if is_first and not config.replay:
        forget_later_steps(Path(config.run_dir), state.step)


def _checkpoints(config: Config, learner: Learner) -> CheckpointWriter:
    return CheckpointWriter(
        Path(config.run_dir) / FOLDER,
        learner.trained,
        keep=config.checkpoint.keep,
        is_asynchronous=config.checkpoint.asynchronous,
    )


def _build_learner(config: Config, checked: Preflight, parallel: Parallel) -> Learner:
    return Learner(
        config.model,
        config.learner.optimizer,
        checked.geometry,
        parallel,
        num_updates=config.loop.num_steps * config.learner.mini_batches_per_step,
        temperature=config.rollout.sampling.temperature,
        reference_path=config.objective.kl.reference,
        truncation=truncation_of(config.rollout, parallel.device.type),
        moe=config.learner.moe,
    )


def _scorer(
    config: Config, checked: Preflight, parallel: Parallel, stack: ExitStack
) -> tuple[Scorer | None, list[str]]:
    """The scorer, on the heads of the replicas; and what rank 0 tells of the expected answers."""
    if not parallel.is_replica_head or config.replay:
        return None, []
    # Its processes import their verifiers while the engines load.
    verifiers, keys = checked.verifiers | checked.set_verifiers, verifier_keys_of(config)
    scorer = stack.enter_context(Scorer(config.reward, verifiers, keys))
    if parallel.rank != 0:
        return scorer, []
    expected = checked.stream.expected_answers(MAX_ANSWERS)
    expected += questions_of(checked.sets, MAX_ANSWERS)
    check_own_functions(expected, verifiers, keys, scorer.crashes)
    return scorer, try_expected_answers(expected, verifiers, scorer.rejections)


def _parts_of(learner: Learner, config: Config) -> list[str]:
    return [
        f"learner: {learner.implementations}",
        f"log-probs: {learner.logprob_backend}",
        *replaced_keys(config),
    ]


def _recorder(
    config: Config, resumption: Resumption, parallel: Parallel, state: LoopState
) -> Recorder:
    return Recorder(
        Path(config.run_dir),
        rank=parallel.rank,
        num_steps=config.loop.num_steps,
        last_step=-1 if resumption.checkpoint is None else state.step,
        config=config,
    )


def _writer(config: Config) -> RolloutWriter:
    return RolloutWriter(Path(config.run_dir) / "rollouts", keep=config.rollout.keep_steps)


def _connect(
    config: Config,
    checked: Preflight,
    parallel: Parallel,
    stopwatch: Stopwatch,
    scorer: Scorer | None,
    addresses: Sequence[EngineAddress],
    *,
    state: LoopState,
    is_changed: bool,
    engines: RunEngines,
    roster: Roster,
    stack: ExitStack,
) -> tuple[RolloutSource | None, Evaluator | None, EngineLink | None]:
    """The source, evaluator and link with which this rank talks to the engines; None where the rank
    does not need one.
    """
    routed = checked.geometry if config.learner.moe.routing_replay == "rollout" else None
    if config.replay and parallel.is_replica_head:
        return replay_source(config, parallel, routed=routed), None, None
    if scorer is None:
        return None, None, None

    pool = HttpEnginePool(
        addresses,
        config.rollout,
        end_token_ids=checked.end_token_ids,
        first=parallel.dp_rank,
        check=engines.check,
        find_ended=engines.ended,
        roster=roster,
        version=lambda: state.published_version,
    )
    environment = make_environment(config, checked.tokenizer, stack)
    source = sampling_source(
        checked.stream.prompts,
        environment,
        pool,
        partial(scorer.score, with_group_verifier=True),
        state=state,
        config=config,
        parallel=parallel,
        time=stopwatch.time,
        is_changed=is_changed,
        stack=stack,
        routed=routed,
    )
    evaluator = Evaluator(
        pool=pool,
        environment=environment,
        score=scorer.score,
        score_texts=scorer.score_texts,
        verifiers=checked.verifiers | checked.set_verifiers,
        sets=checked.sets,
        folder=Path(config.run_dir) / "rollouts" / "eval",
        replica=parallel.dp_rank,
        num_replicas=parallel.dp_size,
        share=parallel.share,
        all_reduce=parallel.reducer(),
    )
    if parallel.rank != 0:
        return source, evaluator, None

    publisher = stack.enter_context(_publisher(config, addresses, parallel, roster))
    link = EngineLink(
        publisher=publisher,
        pool=pool,
        environment=single_turn(checked.tokenizer),  # of the parity probe
        prompts=checked.stream.prompts,
        log=Path(config.run_dir) / SYNC_LOG,
    )
    return source, evaluator, link


def _publisher(
    config: Config, addresses: Sequence[EngineAddress], parallel: Parallel, roster: Roster
) -> Publisher:
    health_timeout = config.rollout.health_timeout_seconds
    return Publisher(
        addresses,
        config.sync,
        wire_dtype=DTYPES[config.rollout.dtype],  # the engines'
        sources=_sources(config, parallel),
        drain_seconds=_drain_seconds(config),
        silence_seconds=lambda url: seconds_of_silence(url, roster, health_timeout),
        leave_out=roster.leave_out,
    )


def _sources(config: Config, parallel: Parallel) -> Sources | None:
    """The ranks that send weights; None on a rank that sends none, and if rank 0 sends all."""
    if not has_many_sources(config.sync.transport) or not parallel.is_weight_source:
        return None
    group = parallel.host.pp if parallel.pp_size > 1 else None
    return Sources(group)


def _drain_seconds(config: Config) -> float:
    """The longest time until requests end that are in flight when weights are published."""
    return config.rollout.request_timeout_seconds if is_ahead(config) else 0.0


def _meter(
    config: Config, learner: Learner, addresses: Sequence[EngineAddress], stack: ExitStack
) -> Meter:
    load = None
    if learner.parallel.rank == 0 and addresses:
        load = stack.enter_context(EngineLoad(addresses))
    log = Path(config.run_dir) / SYNC_LOG
    return Meter(config, learner.geometry, learner.parallel, load, log)


def _contributor(config: Config, parallel: Parallel, stack: ExitStack) -> Contributor | None:
    sources = None if config.replay else _sources(config, parallel)
    if sources is None:
        return None
    wire_dtype = DTYPES[config.rollout.dtype]  # the engines'
    return stack.enter_context(Contributor(config.sync, sources=sources, wire_dtype=wire_dtype))


def _describe(run_dir: Path, state: LoopState, stopwatch: Stopwatch) -> str:
    """The progress of the run, for the last line that is printed when a signal ends it."""
    latest = latest_checkpoint(run_dir / FOLDER)
    if latest is None:
        outlook = "no checkpoint was written yet"
    else:
        outlook = f"resume=auto continues after {latest.name}"
    return f"{_place(state, stopwatch)}; {outlook}"


def _place(state: LoopState, stopwatch: Stopwatch) -> str:
    return f"in step {state.step}, phase {stopwatch.current or 'start'}"
