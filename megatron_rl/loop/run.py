"""Starts a run: engines, learner, prompts, scorer, publisher and recorder, each on the ranks that
need it.

Settings, data and checkpoint are checked before any process is started (preflight.py). The engines
start first and load their model while the learner loads its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.config.file import replaced_keys
from megatron_rl.data.evaluation_sets import questions_of
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.load import EngineLoad
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.roster import Roster
from megatron_rl.learner.layout.deterministic import use_deterministic_algorithms
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.checkpoint import load_checkpoint
from megatron_rl.learner.model.checkpoint_files import FOLDER, latest_checkpoint
from megatron_rl.learner.model.checkpoint_writer import CheckpointWriter
from megatron_rl.learner.passes.frozen import FrozenPolicy
from megatron_rl.loop.ahead import check_ledger
from megatron_rl.loop.crew import Crew
from megatron_rl.loop.engines import RunEngines
from megatron_rl.loop.environments import make_environment, single_turn
from megatron_rl.loop.evaluate import Evaluator
from megatron_rl.loop.expected import MAX_ANSWERS, check_own_functions, try_expected_answers
from megatron_rl.loop.folder import SYNC_LOG, forget_later_steps, prepare_folder
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.machine import Meter
from megatron_rl.loop.parts import Run
from megatron_rl.loop.preflight import Preflight, preflight, truncation_of
from megatron_rl.loop.resume import (
    Resumption,
    check_unfinished,
    plan_resumption,
    verify_resumption,
)
from megatron_rl.loop.senders import make_contributor, make_publisher
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
        contributor = None if link else make_contributor(config, parallel, stack)
        meter = _meter(config, learner, addresses, stack)
        told = resumption.told(state.step, state.next_prompt, state.dual.calibrated_tolerance)
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
    path, temperature = config.objective.kl.reference, config.rollout.sampling.temperature
    reference = None
    if path:
        reference = FrozenPolicy(path, config.model, parallel, temperature=temperature)
    return Learner(
        config.model,
        config.learner.optimizer,
        checked.geometry,
        parallel,
        num_updates=config.loop.num_steps * config.learner.mini_batches_per_step,
        temperature=temperature,
        reference=reference and reference.full_logprobs,
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

    link = EngineLink(
        publisher=make_publisher(config, addresses, parallel, roster, stack),
        pool=pool,
        environment=single_turn(checked.tokenizer),  # of the parity probe
        prompts=checked.stream.prompts,
        log=Path(config.run_dir) / SYNC_LOG,
    )
    return source, evaluator, link


def _meter(
    config: Config, learner: Learner, addresses: Sequence[EngineAddress], stack: ExitStack
) -> Meter:
    load = None
    if learner.parallel.rank == 0 and addresses:
        load = stack.enter_context(EngineLoad(addresses))
    log = Path(config.run_dir) / SYNC_LOG
    return Meter(config, learner.geometry, learner.parallel, load, log)


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
