"""Checks that two commits train identically, bit for bit, for refactors that must change no number.

    python -m tools.compare_commits main HEAD --work runs/compare
    python -m tools.compare_commits main HEAD --work runs/compare --layouts tp2 --objectives gspo
    python -m tools.compare_commits HEAD HEAD --work runs/compare --again      is a run repeatable?

For each layout, dtype and objective, both commits train a few steps on the same recorded rollouts,
on two ranks of this machine. Then all contents of the two run folders are compared by their bits:
the settings, the metrics, the weights, moments and state of the checkpoint, and the Hugging Face
export. The exit status is 1 if anything differs.

This tool does not import the package. It depends only on the interface that users see: `python -m
megatron_rl.train CONFIG` on every rank, the keys of the settings, and the run folder. The first
commit records the rollouts once, with a real engine (--rollouts and --model select an existing
record). The work folder keeps the record, the native code by its sources, and every finished run by
its commit and settings; none of these is made twice. Worktrees are removed at the end.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a script finds tools/
from tools.commit_package import CompareError, Source, digest, git
from tools.compare_runs import compare_runs, report_lines, tensors_of

ROOT = Path(__file__).parents[1]
OBJECTIVES = (  # names of presets
    "dc_grpo",
    "dc_grpo_penalty",
    "gspo",
    "cispo",
    "icepop",
    "sequence_mask",
    "dr_grpo",
    "dppo_tv",
)
LAYOUTS = {"tp2": 2, "dp2": 1}  # parallel.tensor, on two ranks
DTYPES = ("float32", "bfloat16")
RUN_SECONDS, RECORD_SECONDS = 600.0, 1800.0  # time limits; a longer process is considered hung
TINY_MODEL = {
    "--hidden": 64,
    "--layers": 2,
    "--heads": 4,
    "--kv-heads": 2,
    "--head-dim": 32,
    "--initializer-range": 0.1,
}
# Sums of two digits. A short warm start teaches them partly, so that some samples of a group are
# correct and others are not.
RECORDING: dict[str, Any] = {
    "parallel": {"tensor": 2},
    "data": {
        "tasks": [
            {
                "name": "chain_sum",
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
                "prompt_column": "metadata.expression",
                "template": "{prompt}=",
                "verifier": "exact",
            }
        ],
        "num_held_out": 0,
    },
    "warm_start": {"num_steps": 120, "sequences_per_step": 128, "warmup_steps": 20},
    "rollout": {
        "dtype": "bfloat16",
        "kv_cache_gib": 0.25,
        "num_threads": 2,
        "sampling": {"temperature": 1.0, "max_tokens": 6},
    },
    "learner": {"tokens_per_micro_batch": 512, "optimizer": {"learning_rate": 3e-4}},
    "loop": {"prompts_per_step": 16, "samples_per_prompt": 8},
    "eval": {"at_start": False, "at_end": False},
}
# Two updates per step, with a learning rate that moves the policy away from the rollouts within
# five steps, so that clips, masks and lambda take effect.
REPLAY: dict[str, Any] = {
    "learner": {
        "mini_batches_per_step": 2,
        "optimizer": {
            "learning_rate": 5e-4,
            "warmup_steps": 2,
            "decay": "linear",
            "weight_decay": 0.01,
        },
    },
    "checkpoint": {"every": 0},
    "eval": {"at_start": False, "at_end": False},
}
# Tighter bounds than those of the presets, so that both clips and the mask take effect. The bounds
# of gspo and icepop are tight enough.
CLIP = {"clip_low": 0.05, "clip_high": 0.06}
BOUNDS = {
    "gspo": {},
    "dppo_tv": {"clip_low": 0.02, "clip_high": 0.02},
    "sequence_mask": CLIP | {"importance": {"upper": 1.5}},
}
CONSTRAINT = {"initial": 0.5, "learning_rate": 10.0, "tolerance": 0.002}


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One configuration to compare. Example: `Combination(layout="tp2", dtype="float32",
    objective="gspo")`.
    """

    layout: str
    dtype: str
    objective: str

    def __str__(self) -> str:
        return f"{self.layout}-{self.dtype}-{self.objective}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Recorded rollouts and the model that they start from. Example: `Record(
    rollouts=Path("w/recorded/run/rollouts"), model=Path("w/recorded/model"))`; the run's
    config.yaml is next to its rollouts.
    """

    rollouts: Path
    model: Path


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    try:
        with locked(options.work):
            num_different = compare(options)
    except CompareError as error:
        print(f"compare_commits: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - start:.0f} s")
    return 1 if num_different else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a commit; it makes the record")
    parser.add_argument("after", help="another commit")
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is kept")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, metavar="PRESET")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--rollouts", type=Path, help="a run's rollouts/, its config.yaml beside it"
    )
    parser.add_argument("--model", type=Path, help="the checkpoint that run started from")
    parser.add_argument(
        "--native", type=Path, help="folder of native code to share; default: WORK/native"
    )
    parser.add_argument(
        "--again", action="store_true", help="run the second commit anew, whatever is kept of it"
    )
    parser.add_argument(
        "--torchrun", action="store_true", help="start every run by torchrun itself: slower"
    )
    parser.add_argument("--repository", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (options.rollouts is None) != (options.model is None):
        parser.error("--rollouts and --model go together")
    options.work = options.work.resolve()
    options.native = (options.native or options.work / "native").resolve()
    return options


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Lock the work folder, so that only one comparison uses it at a time."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CompareError(f"{work}: another comparison is at work in this folder") from error
        yield


def compare(options: argparse.Namespace) -> int:
    """Make the missing runs and compare all; returns the number of combinations that differ."""
    work, repository = options.work, options.repository
    commits = [resolve(repository, name) for name in (options.before, options.after)]
    of_commit = {commit: Source(repository, commit, work, options.native) for commit in commits}
    sources = [of_commit[commit] for commit in commits]
    combinations = [
        Combination(layout=layout, dtype=dtype, objective=objective)
        for layout, dtype, objective in itertools.product(
            options.layouts, options.dtypes, options.objectives
        )
    ]
    lines: list[str] = []
    num_different = 0
    try:
        record = find_record(options, sources[0])
        key = record_key(record)
        for combination in combinations:
            start = time.perf_counter()
            runs = [
                replay(
                    source, combination, record, key, options, is_again=options.again and place > 0
                )
                for place, source in enumerate(sources)
            ]
            check_moved(runs[0], record)
            comparison = compare_runs(*runs)
            num_different += bool(comparison.differences)
            line = f"{combination!s:34} {comparison.summary}"
            lines.append(line)
            print(f"{line}, {time.perf_counter() - start:.0f} s", flush=True)
            print("".join(f"    {each}\n" for each in report_lines(comparison)), end="", flush=True)
    finally:
        for source in of_commit.values():
            source.close()
    print(f"\n{sources[0].commit[:10]} and {sources[1].commit[:10]}, {options.steps} steps:")
    print("\n".join(lines))
    print(f"not compared, as times: {', '.join(comparison.times)}")
    print(f"settings of one commit only: {', '.join(comparison.new_settings) or 'none'}")
    print(f"{num_different} of {len(lines)} combinations differ")
    return num_different


def find_record(options: argparse.Namespace, source: Source) -> Record:
    """The given record, the kept one, or a new one made by `source`; CompareError if it cannot be
    used.
    """
    folder = options.work / "recorded"
    if options.rollouts is None:
        record = Record(rollouts=folder / "run" / "rollouts", model=folder / "warm")
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make_record(folder, record, source, options.steps)
            (folder / "done").write_text(source.commit + "\n")
    else:
        record = Record(rollouts=options.rollouts.resolve(), model=options.model.resolve())
    for step in range(1, options.steps + 1):
        check_signal(record.rollouts, step)
    return record


def check_signal(rollouts: Path, step: int) -> None:
    """Raise CompareError if the step is not recorded, or if the rewards are equal within every
    group, so that all advantages are 0.
    """
    paths = sorted(rollouts.glob(f"step_{step:06d}.rank*.jsonl"))
    if not paths:
        raise CompareError(f"{rollouts}: expected a step {step}, it is not recorded")
    rewards: dict[int, set[float]] = {}
    for path in paths:
        for sample in map(json.loads, path.read_text().splitlines()):
            rewards.setdefault(sample["prompt_index"], set()).add(sample["reward"])
    if all(len(of_group) == 1 for of_group in rewards.values()):
        raise CompareError(
            f"{rollouts}: expected rewards that differ within a group in step {step}, got the same "
            "everywhere"
        )


def make_record(folder: Path, record: Record, source: Source, num_steps: int) -> None:
    """Make a random model, train it with a short warm start, and record a run with an engine."""
    print(f"recording {num_steps} steps with {source.commit[:10]}", flush=True)
    folder.mkdir(parents=True)
    settings = RECORDING | {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "random")},
        "warm_start": RECORDING["warm_start"] | {"output": str(record.model)},
        "loop": RECORDING["loop"] | {"num_steps": num_steps},
    }
    make_model = [
        "tools/make_tiny_model.py",
        folder / "random",
        *itertools.chain(*TINY_MODEL.items()),
    ]
    source.run(make_model, folder / "model.log", RECORD_SECONDS)
    for module, model in (("sft", folder / "random"), ("train", record.model)):
        config = folder / f"{module}.yaml"
        config.write_text(yaml.safe_dump(settings | {"model": {"path": str(model)}}))
        source.torchrun(module, config, folder / f"{module}.log", RECORD_SECONDS)


def record_key(record: Record) -> str:
    """A key computed from the bytes of model and rollouts, independent of their location."""
    paths = [path for each in (record.rollouts, record.model) for path in sorted(each.rglob("*"))]
    return digest(
        [
            (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in paths
            if path.is_file()
        ]
    )


def replay(
    source: Source,
    combination: Combination,
    record: Record,
    key: str,
    options: argparse.Namespace,
    *,
    is_again: bool,
) -> Path:
    """The folder of the finished run. A kept run is not repeated."""
    settings = replay_settings(combination, record, options.steps)
    packages = [importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")]
    of_all = digest([settings, key, packages, torch.backends.cpu.get_cpu_capability()])
    folder = options.work / "results" / source.commit / f"{combination}-{of_all}"
    if is_again:
        folder = folder.with_name(f"{folder.name}-again")
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / "done").is_file():
        return folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"question": "1+1=", "answer": "2"}\n')  # required, but not used
    settings |= {
        "run_dir": str(folder / "run"),
        "replay": str(record.rollouts),
        "data": {"tasks": [{"path": str(prompts), "verifier": "exact"}], "num_held_out": 0},
    }
    settings["model"] = settings["model"] | {"path": str(record.model)}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    start = source.torchrun if options.torchrun else source.run_ranks
    start("train", folder / "config.yaml", folder / "console.log", RUN_SECONDS)
    (folder / "done").touch()
    return folder / "run"


def replay_settings(combination: Combination, record: Record, num_steps: int) -> dict[str, Any]:
    """The run's settings without paths, with those of the recorded run that its rollouts need."""
    objective = combination.objective
    config = record.rollouts.parent / "config.yaml"
    if not config.is_file():
        raise CompareError(f"{record.rollouts}: expected the run's config.yaml beside it, got none")
    recorded = yaml.safe_load(config.read_text())
    sizes = {name: recorded["loop"][name] for name in ("prompts_per_step", "samples_per_prompt")}
    row = {"tokens_per_micro_batch": recorded["learner"]["tokens_per_micro_batch"]}
    return REPLAY | {
        "model": {"dtype": combination.dtype},
        "parallel": {"tensor": LAYOUTS[combination.layout]},
        "rollout": {"sampling": recorded["rollout"]["sampling"]},
        "objective": {"preset": objective, "constraint": CONSTRAINT} | BOUNDS.get(objective, CLIP),
        "learner": REPLAY["learner"] | row,
        "loop": sizes | {"num_steps": num_steps},
    }


def check_moved(run_dir: Path, record: Record) -> None:
    """Raise CompareError if a run did not change the weights, because its equality would then prove
    nothing.
    """
    start, end = tensors_of(record.model), tensors_of(run_dir / "huggingface")
    if all(torch.equal(tensor, end[name].to(tensor.dtype)) for name, tensor in start.items()):
        raise CompareError(f"{run_dir}: expected weights that moved, got those of {record.model}")


def resolve(repository: Path, name: str) -> str:
    """The full hash; CompareError if the commit is checked out with uncommitted changes."""
    commit = git(repository, "rev-parse", "--verify", f"{name}^{{commit}}")
    is_here = commit == git(repository, "rev-parse", "HEAD")
    changed = git(repository, "status", "--porcelain")
    if is_here and changed:
        raise CompareError(
            f"{name}: expected a clean tree at {repository}, since it is the commit that is "
            f"checked out there, got changes that are not committed:\n{changed}"
        )
    return commit


if __name__ == "__main__":
    sys.exit(main())
