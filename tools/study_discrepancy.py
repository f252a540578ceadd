"""Compares objectives on different engines: runs every arm of a study and reports the results.

    python tools/study_discrepancy.py run configs/studies/discrepancy.yaml --jobs 2 model.path=MODEL
    python tools/study_discrepancy.py report configs/studies/discrepancy.yaml

`run` iterates over engines x seeds x arms, with `--jobs` concurrent training runs. Each job has its
own rollout engine, which serves the job's runs one after another. The command can be stopped and
started again; finished runs are not repeated, and a stopped one is resumed from its checkpoint. If
the study has more_seeds, they are then run for the arms that are within two standard errors of the
first arm, and for that one. A file with several models has all of it once for each.

`report` writes discrepancy-study.md, PNGs of the curves of each engine, and the raw figures of
every step as CSV, from the runs that are finished; the names begin with that of the study's file.

With `--continue-report` the runs of the last report's CSV count as finished, for both actions: the
rest of a study can be run on another machine, without the folders of the first runs.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.lifetime import watch_signals
from megatron_rl.process.tool import run_tool
from megatron_rl.study.curves import PLACE, Curves, read_csv, write_csv
from megatron_rl.study.figures import (
    Record,
    above,
    at_end,
    at_same_entropy,
    at_start,
    is_close,
    late_reward,
    mean_after,
    runs_of,
    with_error,
)
from megatron_rl.study.runs import DONE_FILE
from megatron_rl.study.study import Study, choose, load_studies, run_dir_of, run_study

TOLERANCE = "constraint/tolerance"
LAST_STEPS = 10  # figures at the end of a run are means over so many steps
OVER = f"last {LAST_STEPS} steps"
PANELS = (  # of the curves: metric, label, steps of the moving mean, scale of the axis
    ("reward/mean", f"reward, {OVER}", LAST_STEPS, "linear"),
    ("discrepancy/mean", f"mean |p_train - p_inf|, {OVER}", LAST_STEPS, "linear"),
    ("constraint/lambda", "lambda", 1, "linear"),
    ("loss/entropy/mean", f"entropy, nats, {OVER}", LAST_STEPS, "linear"),
    ("learner/grad_norm", f"gradient norm, {OVER}", LAST_STEPS, "log"),
    ("discrepancy/kl_k3/mean", f"KL (k3), nats, {OVER}", LAST_STEPS, "log"),
)
ARMS_IN_PICTURE = 6  # with the first arm, which is in every picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run or report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("study", type=Path, help="YAML file, see configs/studies/discrepancy.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="further settings of every run"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--models", help="only these, a,b,... (default all)")
    parser.add_argument("--engines", help="only these, a,b,... (default all)")
    parser.add_argument("--arms", help="only these, a,b,... (default all)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the report")
    parser.add_argument(
        "--continue-report",
        action="store_true",
        help="runs whose figures are in the last report count as finished",
    )
    options = parser.parse_intermixed_args(arguments)
    watch_signals(lambda: "finished runs are kept")
    return run_tool("study_discrepancy", lambda: _study(options))


def _study(options: argparse.Namespace) -> None:
    studies = chosen(options)
    path = options.docs / f"{name_of(options.study)}.csv"
    reported = read_csv(path) if options.continue_report else {}
    if options.action == "run":
        for study in studies:
            output = options.output / study.model
            run_all(study, options.overrides, output, options.jobs, of_model(reported, study))
    else:
        curves = read_curves(studies, options.output, reported)
        options.docs.mkdir(parents=True, exist_ok=True)
        write_csv(curves, path)
        write_report(curves, options.docs, options.study)


def chosen(options: argparse.Namespace) -> list[Study]:
    """The part of the study's file that the command line selects, one study a model.

    Raises:
        ConfigError: the file cannot be read, or has no model, engine or arm of a name.
    """
    studies = load_studies(options.study)
    names = [study.model for study in studies]
    wanted = names if options.models is None else options.models.split(",")
    for name in wanted:
        if name not in names:
            raise ConfigError(f"--models: expected some of {', '.join(names)}, got {name!r}")
    return [choose(each, options.engines, options.arms) for each in studies if each.model in wanted]


def run_all(
    study: Study, overrides: Sequence[str], output: Path, jobs: int, reported: Curves
) -> None:
    """Run a study, and then its more_seeds for the arms that are close to the first one.

    Args:
        reported: runs that are not repeated.
    Raises:
        ConfigError, EngineError: see `run_study`.
    """
    run_study(study, overrides, output, jobs, known=reported)
    if not study.more_seeds:
        return
    for engine in study.engines:
        records = finished_curves(replace(study, engines={engine: ()}), output, reported)
        first, *others = study.arms
        close = [arm for arm in others if is_close(records, first, arm)]
        if close:
            print(f"{engine}: seeds {study.more_seeds} for {first}, {', '.join(close)}", flush=True)
            part = choose(study, engine, ",".join([first, *close]))
            run_study(
                replace(part, seeds=study.more_seeds), overrides, output, jobs, known=reported
            )


def finished_curves(study: Study, output: Path, reported: Curves) -> list[Record]:
    """One record per step of every finished run of a model: engine, arm, seed, step and metrics.

    Args:
        reported: runs that are finished too; a folder in `output` is preferred.
    """
    records: list[Record] = []
    for run in replace(study, seeds=study.seeds + study.more_seeds).runs():
        folder = run_dir_of(output, *run)
        if (folder / DONE_FILE).is_file():
            place = dict(zip(PLACE, run, strict=True))
            records += [place | record for record in read_metrics(folder / "metrics.jsonl")]
        else:
            records += reported.get(run, [])
    return records


def read_curves(studies: Sequence[Study], output: Path, reported: Curves) -> list[Record]:
    """The records of every finished run of all models; an engine is named after its model too.

    Raises:
        DataError: no run is finished.
    """
    records: list[Record] = []
    for study in studies:
        found = finished_curves(study, output / study.model, of_model(reported, study))
        records += [each | {"engine": prefix_of(study) + each["engine"]} for each in found]
    if not records:
        raise DataError(f"{output}: expected finished runs, got none; call with run first")
    return records


def of_model(reported: Curves, study: Study) -> Curves:
    """The runs of one model, with the names that its engines have in the study's file."""
    own = {prefix_of(study) + engine: engine for engine in study.engines}
    return {
        (own[engine], arm, seed): [each | {"engine": own[engine]} for each in records]
        for (engine, arm, seed), records in reported.items()
        if engine in own
    }


def prefix_of(study: Study) -> str:
    """What the names of a model's engines begin with in the report."""
    return f"{study.model}-" if study.model else ""


def write_report(records: Sequence[Record], docs: Path, study: Path) -> None:
    """Write the report, and beside it the PNGs of each engine. What was written by hand is kept:
    the title and the sections before "Runs" where they are, the others after the engines.
    """
    name = name_of(study)
    path = docs / f"{name}.md"
    title, before, after = kept_sections(path)
    lines = [
        "## Runs",
        f"Made by `tools/study_discrepancy.py`: `run {study}`, then `report {study}`. Every figure",
        f"is a mean over seeds with its standard error, taken over the last {LAST_STEPS} steps "
        'except where the column says "end" or "last third"; "above" compares runs of one seed;',
        "seconds are over all steps, and only comparable with each other, because runs shared the "
        "machine. Raw figures of every step:",
        f"[{name}.csv]({name}.csv).",
    ]
    for engine in dict.fromkeys(each["engine"] for each in records):
        own = [each for each in records if each["engine"] == engine]
        lines += ["", f"## Engine: {engine}", "", *table_of(own), ""]
        for number, part in enumerate(in_pictures(own), 1):
            picture = f"{name}-{engine}.png" if number == 1 else f"{name}-{engine}-{number}.png"
            draw(part, docs / picture, title=engine)
            lines.append(f"![curves]({picture})")
    path.write_text("\n\n".join([title, *before, "\n".join(lines), *after]) + "\n")
    print(path)


def in_pictures(records: Sequence[Record]) -> list[list[Record]]:
    """The records of the arms that are drawn together: the first one, and some of the others."""
    first, *others = dict.fromkeys(each["arm"] for each in records)
    size = ARMS_IN_PICTURE - 1
    groups = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    return [[each for each in records if each["arm"] in (first, *group)] for group in groups]


def name_of(study: Path) -> str:
    """The name of a study's report: configs/studies/discrepancy.yaml gives discrepancy-study."""
    return f"{study.stem.replace('_', '-')}-study"


def kept_sections(path: Path) -> tuple[str, list[str], list[str]]:
    """What is written by hand in the last report: the title, the sections before the section
    "Runs", and the others.
    """
    before: list[str] = []
    after: list[str] = []
    kept = before
    text = path.read_text() if path.is_file() else f"# {path.stem}\n\n"
    title, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    for section in sections:
        if section.startswith("## Runs\n"):
            kept = after
        elif not section.startswith("## Engine: "):
            kept.append(section.rstrip())
    return title.rstrip(), before, after


def table_of(records: Sequence[Record]) -> list[str]:
    """A Markdown table with one row per arm."""
    last = max(each["step"] for each in records) - LAST_STEPS
    arms = list(dict.fromkeys(each["arm"] for each in records))
    baselines = {run[0]["seed"]: run for run in runs_of(records, arms[0])}
    columns: dict[str, Callable[[list[Record]], float]] = {
        "reward, last third": late_reward,
        f"above {arms[0]}": lambda run: above(run, baselines.get(run[0]["seed"])),
        "avg@8, end": lambda run: at_end(run, "eval/avg_at_8"),
        "gain": lambda run: at_end(run, "eval/avg_at_8") - at_start(run, "eval/avg_at_8"),
        "discrepancy": lambda run: mean_after(run, "discrepancy/mean", last),
        f"{arms[0]}'s at this entropy": lambda run: at_same_entropy(
            run, baselines.get(run[0]["seed"], []), last
        ),
        "tolerance": lambda run: mean_after(run, TOLERANCE, last),
        "fixed gap, end": lambda run: at_end(run, "eval/fixed_gap/mean"),
        "entropy": lambda run: mean_after(run, "loss/entropy/mean", last),
        "lambda, end": lambda run: at_end(run, "constraint/lambda"),
        "penalty / abs(A)": lambda run: mean_after(run, "constraint/penalty_share/mean", last),
        "gradient norm": lambda run: mean_after(run, "learner/grad_norm", last),
        "learner, s a step": lambda run: mean_after(run, "speed/seconds/learner", 0),
    }
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm in arms:
        runs = runs_of(records, arm)
        cells = [with_error([column(run) for run in runs]) for column in columns.values()]
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def draw(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draw PANELS for all arms: the mean over seeds, and a band from the lowest to the highest."""
    figure, grid = pyplot.subplots(3, 2, figsize=(11, 10), sharex=True)
    arms = list(dict.fromkeys(each["arm"] for each in records))
    for (key, label, window, scale), axes in zip(PANELS, grid.flat, strict=True):
        for number, arm in enumerate(arms):
            draw_arm(axes, runs_of(records, arm), key, window, f"C{number}", arm)
        axes.set_ylabel(label)
        # A logarithmic axis needs a value above 0.
        axes.set_yscale(scale if math.isfinite(axes.dataLim.minposy) else "linear")
        axes.grid(color="#e3e7ec")
        axes.spines[["top", "right"]].set_visible(False)
    for number, arm in enumerate(arms):
        draw_tolerance(grid.flat[1], runs_of(records, arm), f"C{number}")
    grid.flat[0].legend(frameon=False, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_arm(
    axes: Axes, runs: Sequence[Sequence[Record]], key: str, window: int, color: str, label: str
) -> None:
    """Draw a metric of one arm, as moving means over `window` steps."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        known = [each for each in run if each.get(key) is not None]
        for end, each in enumerate(known, 1):
            values = [other[key] for other in known[max(0, end - window) : end]]
            by_step.setdefault(each["step"], []).append(statistics.mean(values))
    steps = sorted(by_step)
    axes.plot(steps, [statistics.mean(by_step[s]) for s in steps], color=color, label=label)
    low, high = ([pick(by_step[s]) for s in steps] for pick in (min, max))
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def draw_tolerance(axes: Axes, runs: Sequence[Sequence[Record]], color: str) -> None:
    """Draw the tolerance of an arm with a penalty as a dotted line: the mean over seeds."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        # A step without advantages has no share, but its run has.
        if all(each.get("constraint/penalty_share/mean") is None for each in run):
            continue
        for each in run:
            if each.get(TOLERANCE) is not None:
                by_step.setdefault(each["step"], []).append(each[TOLERANCE])
    steps = sorted(by_step)
    axes.plot(steps, [statistics.mean(by_step[s]) for s in steps], color=color, linestyle=":")


if __name__ == "__main__":
    sys.exit(main())
