"""Measures how well sampling and training overlap (`rollout.max_policy_age`).

    python -m tools.bench_overlap --work DIR [--tokens 64,256,512] [--ages 1,2] [--steps 8]

For every length, a run with max_policy_age=0 gives the seconds of the two legs alone, generation
(with rewards) and training; then a run for each k gives the seconds of a step. Printed are these,
the step over the longer leg, the share of the step in which the replica had no request in flight,
and the share in which the learner waited for rollouts. All are medians over the steps after the
first two. The engine and the learner have `--threads` threads each: with two cores, one each.
Nothing else may run meanwhile. The model is that of tools/bench_step.py, whose responses all have
the same length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a script finds tools/
from megatron_rl.observe.console import SECONDS
from megatron_rl.observe.run_log import read_metrics
from tools.bench_step import SETTINGS, write_model

ROOT = Path(__file__).parents[1]
WARM_STEPS = 2
PHASES = ("rollout", "reward", "learner", "sync")


def step_medians(
    work: Path, model: Path, *, num_tokens: int, num_steps: int, threads: int, overrides: list[str]
) -> dict[str, float]:
    """The medians of the phases, of the whole step and of the idle share, in one run."""
    settings, run_dir = work / "overlap.yaml", work / f"overlap_{time.time_ns()}"
    settings.write_text(SETTINGS.format(model=model, tokens=num_tokens, threads=threads))
    command = ["launch/torchrun.sh", "megatron_rl.train", settings, f"run_dir={run_dir}"]
    command += [f"loop.num_steps={num_steps}", "sync.probe_num_tokens=0", *overrides]
    environment = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": str(threads)}
    with (work / "overlap.log").open("w") as log:
        subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True
        )
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] > WARM_STEPS]
    phases = [{name: line.get(SECONDS + name, 0.0) for name in PHASES} for line in lines]
    medians = {name: statistics.median(each[name] for each in phases) for name in PHASES}
    return medians | {
        "step": statistics.median(sum(each.values()) for each in phases),
        "idle": statistics.median(line.get("rollout/idle_share/mean", 0.0) for line in lines),
        "age": max(line["discrepancy/age/max"] for line in lines),
    }


def main(argv: list[str] | None = None) -> int:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model and runs")
    parser.add_argument("--tokens", default="64,256,512", help="new tokens a response")
    parser.add_argument("--ages", default="1,2", help="values of rollout.max_policy_age")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--override", action="append", default=[], help="key=value, for all runs")
    options = parser.parse_args(argv)
    work = options.work.resolve()
    model = work / "model"
    if not model.exists():
        write_model(model)
    print("| new tokens | k | generate, s | train, s | step, s | step / longer leg | engine idle |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for num_tokens in map(int, options.tokens.split(",")):
        legs: dict[str, float] = {}
        for age in (0, *map(int, options.ages.split(","))):
            found = step_medians(
                work,
                model,
                num_tokens=num_tokens,
                num_steps=options.steps,
                threads=options.threads,
                overrides=[*options.override, f"rollout.max_policy_age={age}"],
            )
            legs = legs or {
                "generate": found["rollout"] + found["reward"],
                "train": found["learner"],
            }
            assert found["age"] <= age, found
            # Without sampling ahead, the engine has nothing to do while the learner trains.
            idle = found["idle"] if age else 1 - legs["generate"] / found["step"]
            print(
                f"| {num_tokens} | {age} | {legs['generate']:.2f} | {legs['train']:.2f} "
                f"| {found['step']:.2f} | {found['step'] / max(legs.values()):.2f} "
                f"| {idle:.0%}; learner {found['rollout'] / found['step']:.0%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
