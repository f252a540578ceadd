"""Runs a study: every arm (an objective to compare) on every engine with every seed.

The settings of an engine are those of its rollout server and any others that its arms share. The
runs of one engine use the same servers: `jobs` servers run throughout, and each of them serves one
run at a time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from omegaconf import OmegaConf

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.engine.server import Engine
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.process.lifetime import is_ending
from megatron_rl.study.runs import is_finished, run_to_the_end, shared_engines

Parts = dict[str, tuple[str, ...]]  # name of an engine or an arm -> settings, `key=value`


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The definition of a study.

    Example: `Study(config="configs/quickstart.yaml", settings=("loop.num_steps=60",),
    seeds=(0, 1), more_seeds=(2,), engines={"bf16": ()},
    arms={"grpo": ("objective.constraint.enabled=false",)}, model="")`.
    """

    model: str  # the name of this model among those of the file; "": the file has one
    config: str  # YAML file that every run starts from
    settings: tuple[str, ...]  # of every run, `key=value`
    seeds: tuple[int, ...]
    more_seeds: tuple[int, ...]  # of arms that these seeds do not tell from the first one
    engines: Parts
    arms: Parts  # the first one is the baseline of the comparison

    def runs(self) -> list[tuple[str, str, int]]:
        """Engine, arm and seed of every run, in order: all arms of a seed before the next seed."""
        return [
            (engine, arm, seed)
            for engine in self.engines
            for seed in self.seeds
            for arm in self.arms
        ]

    def overrides(self, engine: str, arm: str, seed: int) -> list[str]:
        """The settings that a run adds to `config`."""
        own = [*self.settings, *self.engines[engine], *self.arms[arm]]
        return [*own, f"loop.seed={seed}", f"data.seed={seed}"]


def load_studies(path: Path) -> tuple[Study, ...]:
    """Read a YAML file: one study for each of its models.

    The fields are those of `Study`; more_seeds may be missing. Instead of config, a file may have
    `models`, from a name to the config and the settings of the model, and, if the model is not for
    all of them, the names of its engines and arms.

    Raises:
        ConfigError: the file cannot be read, or lacks a field.
    """
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
        models = found.get("models") or {"": {"config": found["config"], "settings": []}}
        everything = {
            part: {name: tuple(map(str, keys)) for name, keys in found[part].items()}
            for part in ("engines", "arms")
        }
        return tuple(
            Study(
                model=name,
                config=str(model["config"]),
                settings=(*map(str, found["settings"]), *map(str, model["settings"])),
                seeds=tuple(map(int, found["seeds"])),
                more_seeds=tuple(map(int, found.get("more_seeds", ()))),
                engines={
                    each: everything["engines"][each] for each in _names(model, "engines", found)
                },
                arms={each: everything["arms"][each] for each in _names(model, "arms", found)},
            )
            for name, model in models.items()
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected config or models, settings, seeds, engines and arms as in "
            f"configs/studies/*.yaml, got {error!r}"
        ) from error


def _names(model: dict[str, Any], part: str, found: dict[str, Any]) -> list[str]:
    return list(model.get(part) or found[part])


def choose(study: Study, engines: str | None, arms: str | None) -> Study:
    """The part of a study that the command line selects.

    Args:
        engines, arms: comma-separated names; None: all of them.
    Raises:
        ConfigError: the study has no engine or arm with one of the names.
    """

    def those(known: Parts, names: str | None, what: str) -> Parts:
        wanted = list(known) if names is None else names.split(",")
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ConfigError(f"--{what}: expected some of {', '.join(known)}, got {unknown[0]!r}")
        return {name: known[name] for name in wanted}

    return replace(
        study,
        engines=those(study.engines, engines, "engines"),
        arms=those(study.arms, arms, "arms"),
    )


def run_study(
    study: Study,
    overrides: Sequence[str],
    output: Path,
    jobs: int,
    known: Container[tuple[str, str, int]] = (),
) -> None:
    """Run all runs of a study that are not finished; after a failure the others still run.

    Args:
        overrides: further settings of every run, `key=value`; they win.
        output: folder of the runs, see `run_dir_of`.
        jobs: number of concurrent runs.
        known: engine, arm and seed of runs that count as finished without a folder.
    Raises:
        ConfigError: settings cannot be loaded or do not match; raised before anything runs.
        EngineError: runs failed; raised at the end, with their names.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs: expected at least 1, got {jobs}")
    pending = {
        engine: [
            (arm, seed)
            for arm, seed in unfinished(study, engine, overrides, output)
            if (engine, arm, seed) not in known
        ]
        for engine in study.engines
    }
    failed = [
        name
        for engine, runs in pending.items()
        if runs
        for name in run_engine(study, engine, runs, overrides, output, min(jobs, len(runs)))
    ]
    if failed:
        raise EngineError(f"expected every run to succeed, got failures of {', '.join(failed)}")


def unfinished(
    study: Study, engine: str, overrides: Sequence[str], output: Path
) -> list[tuple[str, int]]:
    """Arms and seeds that must still be run on an engine.

    Raises:
        ConfigError: settings cannot be loaded, a run's folder holds a finished run with other
            settings, or an arm's rollout settings or model differ from the engine's.
    """
    pending = []
    shared = served_settings(study, engine, overrides)
    for _, arm, seed in replace(study, engines={engine: study.engines[engine]}).runs():
        settings = [*study.overrides(engine, arm, seed), *overrides]
        if is_finished(study.config, settings, run_dir_of(output, engine, arm, seed)):
            continue
        own = load_config(study.config, settings)
        if (own.model.path, own.rollout) != (shared.model.path, shared.rollout):
            raise ConfigError(
                f"arm {arm}: expected the rollout settings and the model of the engine {engine}, "
                "which it shares with other arms, got its own; make it an engine"
            )
        pending.append((arm, seed))
    return pending


def served_settings(study: Study, engine: str, overrides: Sequence[str]) -> Config:
    """The settings that the servers of an engine are started with. They can send the heads of
    log-probs that the arms with score centering ask for.
    """
    shared = [*study.settings, *study.engines[engine]]
    config = load_config(study.config, [*shared, *overrides])
    of_arms = [
        load_config(study.config, [*shared, *keys, *overrides]) for keys in study.arms.values()
    ]
    centering = max(
        (each.objective.score_centering for each in of_arms), key=lambda each: each.num_requested
    )
    return replace(config, objective=replace(config.objective, score_centering=centering))


def run_engine(
    study: Study,
    engine: str,
    pending: Sequence[tuple[str, int]],
    overrides: Sequence[str],
    output: Path,
    jobs: int,
) -> list[str]:
    """Run the arms and seeds of `pending` on one engine, `jobs` at a time.

    Returns:
        The names of the runs that failed; once a server has died, also of those not started.
    """
    config = served_settings(study, engine, overrides)
    num_ranks = config.parallel.replica_size
    num_threads = max(1, len(os.sched_getaffinity(0)) // (jobs * num_ranks))
    free: SimpleQueue[Engine] = SimpleQueue()
    has_dead_engine = threading.Event()

    def run(arm: str, seed: int) -> str | None:
        name, server = f"{engine}/{arm}/seed {seed}", free.get()
        settings = [*study.overrides(engine, arm, seed), *overrides]
        folder = run_dir_of(output, engine, arm, seed)
        try:
            if is_ending() or has_dead_engine.is_set():
                return name
            print(name, flush=True)
            run_to_the_end(study.config, settings, folder, engine=server, num_threads=num_threads)
        except EngineError as error:
            print(error, file=sys.stderr, flush=True)
            if not server.is_alive():
                has_dead_engine.set()
            return name
        finally:
            free.put(server)
        return None

    with shared_engines(config, output / engine / "engines", count=jobs) as servers:
        for server in servers:
            free.put(server)
        with ThreadPoolExecutor(jobs) as pool:
            return [name for name in pool.map(lambda each: run(*each), pending) if name]


def run_dir_of(output: Path, engine: str, arm: str, seed: int) -> Path:
    """The folder of one run."""
    return output / engine / arm / f"seed_{seed}"
