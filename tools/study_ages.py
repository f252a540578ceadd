"""What sampling ahead costs in samples, and what it gains in seconds: avg@8 by max_policy_age.

    python -m tools.study_ages time configs/studies/ages.yaml
    python -m tools.study_ages report configs/studies/ages.yaml

The engines of the study's file differ by age. `time` measures the seconds of a step with each by a
short run of the first arm, one after another, with one thread for the learner and one for the
engine. Nothing else may run meanwhile. It writes docs/<study>-seconds.csv.

`report` reads these and the figures of `tools/study_discrepancy.py report`, draws avg@8 over
samples and over seconds (docs/<study>-ages.png), and prints a table: avg@8 at the last step, and
at the time at which the quickest engine ends (between two evaluations a straight line), means over
seeds with their standard errors.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.observe.console import SECONDS
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.tool import run_tool
from megatron_rl.study.curves import read_csv
from megatron_rl.study.figures import with_error
from megatron_rl.study.runs import run_to_the_end
from megatron_rl.study.study import Study, load_studies, run_dir_of
from tools.bench_overlap import PHASES
from tools.study_discrepancy import name_of

WARM_STEPS = 5
NO_EVALUATIONS = ("eval.every=0", "eval.at_start=false", "eval.at_end=false")
AVERAGE = "eval/avg_at_8"

Curve = tuple[list[int], list[float]]  # steps, and avg@8 after them


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure or report; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("time", "report"))
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--steps", type=int, default=30, help="of a run that is timed")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/ages"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the report")
    options = parser.parse_args(arguments)
    action = measure if options.action == "time" else report
    return run_tool("study_ages", lambda: action(options))


def measure(options: argparse.Namespace) -> None:
    """Time a step with every engine."""
    study = the_study(options.study)
    arm, seed = next(iter(study.arms)), study.seeds[0]
    settings = (f"loop.num_steps={options.steps}", "rollout.num_threads=1", *NO_EVALUATIONS)
    runs = {
        engine: run_to_the_end(
            study.config,
            [*study.overrides(engine, arm, seed), *settings],
            run_dir_of(options.output, engine, arm, seed),
            num_threads=1,
        )
        for engine in study.engines
    }
    path = options.docs / f"{name_of(options.study)}-seconds.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["engine", "seconds"])
        for engine, run_dir in runs.items():
            lines = read_metrics(run_dir / "metrics.jsonl")
            seconds = [
                sum(line.get(SECONDS + phase, 0.0) for phase in PHASES)
                for line in lines
                if line["step"] > WARM_STEPS
            ]
            writer.writerow([engine, f"{statistics.median(seconds):.4g}"])
    print(path)


def report(options: argparse.Namespace) -> None:
    """Draw and print."""
    study, name = the_study(options.study), name_of(options.study)
    with (options.docs / f"{name}-seconds.csv").open(newline="") as file:
        seconds = {line["engine"]: float(line["seconds"]) for line in csv.DictReader(file)}
    curves = read_curves(options.docs / f"{name}.csv", study)
    picture = options.docs / f"{name}-ages.png"
    draw(curves, seconds, picture)
    print("\n".join(table_of(curves, seconds)))
    print(picture)


def the_study(path: Path) -> Study:
    """The only study of a file.

    Raises:
        ConfigError: the file cannot be read, or has several models.
    """
    studies = load_studies(path)
    if len(studies) > 1:
        raise ConfigError(f"{path}: expected a study of one model, got {len(studies)} models")
    return studies[0]


def read_curves(path: Path, study: Study) -> dict[tuple[str, str], list[Curve]]:
    """avg@8 of every seed, by engine and arm.

    Raises:
        DataError: the figures cannot be read, or have no evaluation.
    """
    runs: dict[tuple[str, str, int], Curve] = {}
    for run, records in read_csv(path).items():
        evaluated = [each for each in records if AVERAGE in each]
        if evaluated:
            steps, values = ([each[key] for each in evaluated] for key in ("step", AVERAGE))
            runs[run] = (steps, values)
    if not runs:
        raise DataError(f"{path}: expected evaluations, got none")
    return {
        (engine, arm): [runs[key] for key in runs if key[:2] == (engine, arm)]
        for engine in study.engines
        for arm in study.arms
        if any(key[:2] == (engine, arm) for key in runs)
    }


def table_of(
    curves: Mapping[tuple[str, str], Sequence[Curve]], seconds: Mapping[str, float]
) -> list[str]:
    """A Markdown table with a row for each engine and a pair of columns for each arm."""
    engines = list(dict.fromkeys(engine for engine, _ in curves))
    arms = list(dict.fromkeys(arm for _, arm in curves))
    last = max(runs[0][0][-1] for runs in curves.values())
    end = min(seconds[engine] * last for engine in engines)
    names = [f"{arm}, {when}" for arm in arms for when in (f"step {last}", f"{end:.0f} s")]
    lines = ["| engine | s a step | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for engine in engines:
        cells = [f"{seconds[engine]:.2f}"]
        for arm in arms:
            runs = curves.get((engine, arm), [])
            cells.append(with_error([values[-1] for _, values in runs]))
            at = end / seconds[engine]
            cells.append(with_error([float(numpy.interp(at, *run)) for run in runs]))
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return lines


def draw(
    curves: Mapping[tuple[str, str], Sequence[Curve]], seconds: Mapping[str, float], output: Path
) -> None:
    """avg@8 over steps and over seconds: a row of panels for each arm, a colour for each engine,
    the mean over seeds with its standard error.
    """
    engines = list(dict.fromkeys(engine for engine, _ in curves))
    arms = list(dict.fromkeys(arm for _, arm in curves))
    figure, grid = pyplot.subplots(
        *(len(arms), 2), figsize=(10, 2.9 * len(arms)), sharex="col", sharey=True, squeeze=False
    )
    for (engine, arm), runs in curves.items():
        for axes, scale in zip(grid[arms.index(arm)], (1.0, seconds[engine]), strict=True):
            draw_runs(axes, runs, scale, f"C{engines.index(engine)}", engine)
    for arm, row in zip(arms, grid, strict=True):
        row[0].set_title(arm, loc="left", fontsize=10)
        row[0].set_ylabel("avg@8")
        for axes in row:
            axes.grid(color="#e3e7ec")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    grid[-1, 0].set_xlabel("step: equal samples")
    grid[-1, 1].set_xlabel("seconds, with a core each for learner and engine")
    figure.tight_layout()
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def draw_runs(axes: Axes, runs: Sequence[Curve], scale: float, color: str, label: str) -> None:
    """The mean and the standard error of runs that were evaluated after the same steps."""
    steps = scale * numpy.array(runs[0][0])
    values = numpy.array([values for _, values in runs])
    error = values.std(axis=0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else 0.0
    mean = values.mean(axis=0)
    axes.plot(steps, mean, color=color, label=label)
    axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    sys.exit(main())
