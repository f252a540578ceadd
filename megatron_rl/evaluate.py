"""`python -m megatron_rl.evaluate CONFIG model.path=FOLDER [key=value ...]`: evaluates a checkpoint
on the sets of a config, without a learner.

The sets are those of `eval.sets`, and the held-out prompts of `data.tasks` if there are any. One
process starts the engines (or takes those of `rollout.urls`, with the weights that they serve) and
samples with the environment and the seeds that a training run uses. Everything is written to a new
folder `<run_dir>/evaluations/<number>`: `results.json`, the settings, every sample, the engines'
logs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rl.config import Config, ParallelConfig, SamplingConfig
from megatron_rl.config.file import save_config
from megatron_rl.data.end_tokens import end_tokens
from megatron_rl.data.evaluation_sets import EvaluationSet, held_out_set
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import EnginePool
from megatron_rl.engine.server import check_given, given_addresses
from megatron_rl.engine.start import start_engines_of
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.loop.environments import make_environment, single_turn
from megatron_rl.loop.evaluate import Evaluator, evaluate_sets
from megatron_rl.loop.expected import check_own_functions
from megatron_rl.loop.preflight import (
    prepare_model,
    prepare_sets,
    prepare_stream,
)
from megatron_rl.loop.state import initial_state
from megatron_rl.loop.verifiers import set_verifiers_of, verifier_keys_of
from megatron_rl.observe.evaluations import HELD_OUT_LABEL, evaluation_table, figures_of_sets
from megatron_rl.observe.hints import evaluation_hints
from megatron_rl.observe.loading import LoadingConsole
from megatron_rl.process.command import Progress, run_command
from megatron_rl.process.folder import check_new_folder, hold_folder
from megatron_rl.process.lifetime import register_cleanup
from megatron_rl.records import Prompt
from megatron_rl.reward.registry import resolve_verifiers
from megatron_rl.reward.score import Scorer
from megatron_rl.rollout.counted import CountedEpisodes
from megatron_rl.rollout.environment import Environment, EpisodeRequest
from megatron_rl.rollout.live import run_episodes

RESULTS = "results.json"
# If the output is no terminal: seconds between two lines of progress, and columns of the table.
LINE_SECONDS = 60.0
FILE_WIDTH = 120


def evaluate(config: Config, progress: Progress) -> None:
    """Evaluate and write the results; see the docstring of this module.

    Raises:
        ConfigError, DataError, EngineError: what is wrong, and where to change it.
    """
    config = without_learner(config)
    with ExitStack() as stack:
        watch = stack.enter_context(LoadingConsole(is_shown=True, line_seconds=LINE_SECONDS))
        geometry, tokenizer = prepare_model(config)
        sets = prepare_sets(config, geometry, tokenizer, watch)
        verifiers = set_verifiers_of(config)
        if has_held_out(config):
            stream = prepare_stream(config, geometry, tokenizer, watch)
            sets = (held_out_set(stream.held_out(), config.eval), *sets)
            verifiers |= resolve_verifiers(config.data.tasks)
        if not sets:
            raise ConfigError(
                "eval.sets: expected a set to evaluate on, or data.tasks with data.num_held_out, "
                "got neither"
            )
        keys = verifier_keys_of(config)
        scorer = stack.enter_context(Scorer(config.reward, verifiers, keys))
        questions = [(each.name, prompt) for each in sets for prompt in each.prompts]
        check_own_functions(questions, verifiers, keys, scorer.crashes)
        folder = new_folder(Path(config.run_dir) / "evaluations")
        hold_folder(folder, f"run_dir={config.run_dir}")
        save_config(config, folder / "config.yaml")
        pool = _start_pool(
            config, folder, end_tokens(config.model.path, tokenizer, geometry.vocab_size), stack
        )
        state = initial_state(config.objective.constraint)
        state.published_version = served_version(pool, single_turn(tokenizer), sets[0].prompts[0])
        counted = CountedEpisodes(
            make_environment(config, tokenizer, stack),
            sum(len(each.prompts) for each in sets),
            watch.progress,
        )
        progress.describe = lambda: f"{counted.num_done} of {counted.num_all} questions answered"
        watch.start_clock()  # the engines may have taken minutes to start
        start = time.monotonic()
        evaluator = Evaluator(
            pool=pool,
            environment=counted,
            score=scorer.score,
            score_texts=scorer.score_texts,
            verifiers=verifiers,
            sets=sets,
            folder=folder / "rollouts",
            replica=0,
            num_replicas=1,
            share=lambda count: (0, count),
            all_reduce=lambda values, _: values,
        )
        figures = evaluate_sets(evaluator, state, config, lambda _: nullcontext())
        seconds = time.monotonic() - start
    results = results_of(config, sets, figures, state.published_version)
    (folder / RESULTS).write_text(json.dumps(results | {"seconds": seconds}, indent=2) + "\n")
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width)
    console.print(evaluation_table(figures, title=config.model.path))
    for line in evaluation_hints(figures, folder):
        console.print(line, markup=False)
    console.print(f"{seconds:.0f} s; samples and {RESULTS} in {folder}", markup=False)


def without_learner(config: Config) -> Config:
    """The settings of an evaluation: those of a run, less what only a learner needs.

    Raises:
        ConfigError: there are several processes, rollouts are to be replayed, or the engines are
            on nodes of their own.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        raise ConfigError(
            f"evaluate: expected one process, got WORLD_SIZE={num_ranks}: start it without "
            "torchrun; more engines come from rollout.num_engines"
        )
    if config.replay:
        raise ConfigError(
            f"replay: expected none, since an evaluation samples, got {config.replay!r}"
        )
    if config.rollout.placement == "nodes" and config.rollout.num_engines:
        raise ConfigError(
            "rollout.placement=nodes: expected engines that an evaluation starts itself or is "
            "given, got those of a run; set rollout.placement=auto, or rollout.num_engines=0 and "
            "rollout.urls"
        )
    kl = replace(config.objective.kl, coefficient=0.0, reference="")
    return replace(
        config,
        parallel=ParallelConfig(timeout_seconds=config.parallel.timeout_seconds),
        objective=replace(config.objective, kl=kl),
    )


def has_held_out(config: Config) -> bool:
    """Whether prompts are held out of the training data of the config."""
    return bool(config.data.tasks) and config.data.num_held_out > 0


def new_folder(parent: Path) -> Path:
    """A new folder `parent`/0001, or of the next number that is not taken.

    Raises:
        ConfigError: it cannot be made.
    """
    check_new_folder(parent / "0001", f"run_dir={parent.parent}")
    for number in itertools.count(1):
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always another number")


def _start_pool(
    config: Config, folder: Path, end_token_ids: tuple[int, ...], stack: ExitStack
) -> HttpEnginePool:
    """Engines that are ready: started ones, which `stack` ends, or those of `rollout.urls`."""
    engines = start_engines_of(config, folder, is_sent_weights=False)
    for engine in engines:
        stack.callback(engine.stop)
        register_cleanup(engine.stop)
    for engine in engines:
        engine.wait_ready()
    given = given_addresses(config.rollout)
    check_given(given)

    def check_engines() -> None:
        for engine in engines:
            engine.check()

    return HttpEnginePool(
        [*(engine.address for engine in engines), *given],
        config.rollout,
        end_token_ids=end_token_ids,
        check=check_engines,
    )


def served_version(pool: EnginePool, environment: Environment, prompt: Prompt) -> int:
    """The version of the weights that all engines serve; 0 if nothing was published to them.

    Args:
        prompt: any; each engine samples one token for it.

    Raises:
        EngineError: the engines serve different versions.
    """
    requests = [EpisodeRequest(num_samples=1, seed=0, sampling=SamplingConfig(max_tokens=1))]
    groups = run_episodes(
        pool,
        environment,
        [replace(prompt, index=index) for index in range(len(pool.urls))],
        requests * len(pool.urls),
    )
    rollouts = [group.rollouts[0] for group in groups]
    versions = {rollout.engine: int(max(rollout.weight_versions)) for rollout in rollouts}
    if len(set(versions.values())) > 1:
        raise EngineError(
            "rollout.urls: expected engines that serve the same weights, got versions "
            f"{', '.join(f'{version} at {url}' for url, version in versions.items())}"
        )
    return max(versions.values())


def results_of(
    config: Config, sets: tuple[EvaluationSet, ...], figures: dict[str, float], version: int
) -> dict[str, Any]:
    """The contents of `results.json`, as plain JSON values: the figures under the keys of a run's
    metrics, and again by set, with what was asked.
    """
    by_set = figures_of_sets(figures)
    return {
        "model": config.model.path,
        "weights_version": version,
        "seed": config.loop.seed,
        "figures": figures,
        "sets": {
            each.name or HELD_OUT_LABEL: {
                "num_questions": len(each.prompts),
                "num_samples": each.num_samples,
                "sampling": asdict(each.sampling),
                "figures": by_set.get(each.name, {}),
            }
            for each in sets
        },
    }


if __name__ == "__main__":
    sys.exit(run_command("Evaluate a checkpoint, without training.", evaluate))
