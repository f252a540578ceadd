"""Draws a run into one PNG: the reward, the discrepancy with its tolerance, the constrained signal
if it is another one, lambda, and the log-odds displacement by confidence. Of several runs it draws
reward, discrepancy, lambda and tokens per second, a colour for each run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.objective.log_odds import CONFIDENCES
from megatron_rl.observe.evaluations import AT_K, evaluation_label
from megatron_rl.observe.run_log import Record, read_metrics
from megatron_rl.process.tool import run_tool

SIGNAL = "constraint/signal/mean"
QUANTILES = (1, 25, 50, 75, 99)  # of the log-odds displacement, in per cent
BLUE, ORANGE, RED, GREEN, GREY = "#2563a8", "#d9822b", "#c23b3b", "#2f8f5b", "#5f6b7a"
PURPLE, TEAL, BROWN = "#7a4fa3", "#1f8a8a", "#8a5a2b"
COLORS = (BLUE, ORANGE, GREEN, RED, GREY, PURPLE)  # of runs that are compared
SET_COLORS = (GREEN, PURPLE, TEAL, BROWN, RED, GREY)  # of evaluation sets
LABEL_GAP = 0.07  # of the axis, between two labels of the same step
COMPARED = {
    "reward/mean": "reward",
    "discrepancy/mean": "discrepancy",
    "constraint/lambda": "lambda",
    "speed/tokens_per_second": "tokens per second",
    "speed/mfu": "MFU",
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "legend.frameon": False,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and draw the run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="folder with metrics.jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, help="PNG; default curves.png in the first RUN_DIR"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.run_dir[0] / "curves.png"
    return run_tool("plot_run", lambda: _draw_all(options.run_dir, output))


def _draw_all(folders: Sequence[Path], output: Path) -> None:
    if output.suffix != ".png":
        raise ConfigError(f"--output: expected a name that ends in .png, got {output}")
    runs = {str(folder): _records_of(folder) for folder in folders}
    if len(runs) == 1:
        [(name, records)] = runs.items()
        plot_run(records, output, title=name)
    else:
        compare_runs(runs, output)
    print(f"picture: {output}")


def _records_of(folder: Path) -> list[Record]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of a run, got none")
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise DataError(f"{folder / 'metrics.jsonl'}: expected steps, got none")
    return records


def compare_runs(runs: Mapping[str, Sequence[Record]], output: Path) -> None:
    """Write a PNG with a panel for each metric of COMPARED that a run has, and a curve in it for
    each run.

    Args:
        runs: lines of a metrics.jsonl by the name of the run.
    """
    panels = {
        label: key
        for key, label in COMPARED.items()
        if any(series(records, key)[0] for records in runs.values())
    }
    with pyplot.rc_context(STYLE):
        figure, all_axes = pyplot.subplots(
            len(panels),
            1,
            figsize=(8, 2.7 * len(panels)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, (label, key) in zip(all_axes[:, 0], panels.items(), strict=True):
            for (name, records), color in zip(runs.items(), itertools.cycle(COLORS)):
                _draw_curve(axes, records, key, color=color, label=name)
            axes.set_ylabel(label)
        _add_legend(all_axes[0, 0])
        _number_steps(all_axes[-1, 0])
        figure.savefig(output, dpi=150)
        pyplot.close(figure)


def plot_run(records: Sequence[Record], output: Path, *, title: str) -> None:
    """Write a PNG of panels that share the axis of steps, and of one with an axis of confidence.
    Panels of what the records do not have are left out.

    Args:
        records: lines of a metrics.jsonl; a step without a key is left out of the curve.
        output: path of the PNG.
        title: of the figure.
    """
    with pyplot.rc_context(STYLE):
        heights = {"reward": 1.3, "gap": 1.1}
        heights |= {"signal": 1.1} if series(records, SIGNAL)[0] else {}
        heights |= {"lambda": 0.8}
        heights |= {"log-odds": 1.3} if has_log_odds(records) else {}
        figure, all_axes = pyplot.subplots(
            len(heights),
            1,
            figsize=(8, 2.5 * sum(heights.values())),
            height_ratios=list(heights.values()),
            layout="constrained",
        )
        axes = dict(zip(heights, all_axes, strict=True))
        for name in heights.keys() - {"lambda", "log-odds"}:
            axes[name].sharex(axes["lambda"])
            axes[name].tick_params(labelbottom=False)
        _draw_reward(axes["reward"], records)
        _draw_gap(
            axes["gap"], records, "discrepancy/mean", "constraint/tolerance", "|p_train - p_inf|"
        )
        axes["gap"].set_ylabel("discrepancy")
        if "signal" in axes:
            tolerance = "constraint/signal/tolerance"
            _draw_gap(axes["signal"], records, SIGNAL, tolerance, "constrained signal")
            axes["signal"].set_ylabel("signal")
        steps, values = series(records, "constraint/lambda")
        axes["lambda"].plot(steps, values, _marker(steps), color=ORANGE, linewidth=2)
        axes["lambda"].set_ylabel("lambda")
        _number_steps(axes["lambda"])
        first, last = records[0]["step"], records[-1]["step"]
        room = 0.09 * max(1, last - first)  # for the labels at both ends of the curves
        axes["lambda"].set_xlim(first - room, last + room)
        if "log-odds" in axes:
            _draw_log_odds(axes["log-odds"], records)
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(output, dpi=150)
        pyplot.close(figure)


def has_log_odds(records: Sequence[Record]) -> bool:
    """Whether the log-odds displacement was measured in a step."""
    return any(f"discrepancy/{each}/q50" in record for record in records for each in CONFIDENCES)


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, for the steps that have a finite value."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Moving mean over a centred window, which is truncated at both ends."""
    half = window // 2
    parts = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _draw_curve(axes: Axes, records: Sequence[Record], key: str, *, color: str, label: str) -> None:
    """Draw the values faintly, and their moving mean over a tenth of the run."""
    steps, values = series(records, key)
    window = max(1, len(values) // 10)
    if window > 2:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    curve = smooth(values, window)
    axes.plot(steps, curve, _marker(steps), color=color, linewidth=2, label=label)


def _marker(steps: Sequence[int]) -> str:
    """The form of a curve: a single value is a dot, since it makes no line."""
    return "o" if len(steps) == 1 else "-"


def _number_steps(axes: Axes) -> None:
    """Name the axis of steps, with ticks at whole steps only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")


def _add_legend(axes: Axes) -> None:
    """Put the legend above the panel, where it covers nothing."""
    if handles := axes.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.1}
        axes.legend(**place, ncols=min(3, len(handles)), fontsize=9)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Where the labels of these values go: at the values, or higher where the one below is near.

    Args:
        gap: the smallest distance of two labels, in the unit of the values.
    """
    places = list(values)
    highest = float("-inf")
    for index in sorted(range(len(values)), key=values.__getitem__):
        places[index] = highest = max(values[index], highest + gap)
    return places


def _label_ends(axes: Axes, curves: Sequence[tuple[list[int], list[float], str]]) -> None:
    """Write the first and the last value beside each curve (steps, values, colour)."""
    bottom, top = axes.get_ylim()
    for end, align, offset in ((0, "right", -8), (-1, "left", 8)):
        ends = [
            (steps[end], values[end], color)
            for steps, values, color in curves
            if len(steps) > (end != 0)  # a single value is its first
        ]
        places = spread([value for _, value, _ in ends], LABEL_GAP * (top - bottom))
        for (step, value, color), place in zip(ends, places, strict=True):
            axes.annotate(
                f"{value:.2f}",
                (step, place),
                textcoords="offset points",
                xytext=(offset, 0),
                ha=align,
                va="center",
                annotation_clip=False,
                color=color,
                fontweight="bold",
            )


def _draw_reward(axes: Axes, records: Sequence[Record]) -> None:
    _draw_curve(axes, records, "reward/mean", color=BLUE, label="reward, training prompts")
    keys = {key for record in records for key in record if key.startswith("eval/")}
    matches = [
        match for key in sorted(keys) if (match := AT_K.fullmatch(key)) and match[2] == "avg"
    ]
    curves = []
    for match, marker, color in zip(
        matches, itertools.cycle("o^sDvP*"), itertools.cycle(SET_COLORS)
    ):
        steps, values = series(records, match[0])
        name = evaluation_label(match[0]) + ("" if match[1] else ", held out")
        axes.plot(steps, values, f"{marker}--", color=color, linewidth=1, markersize=7, label=name)
        curves.append((steps, values, color))
    axes.margins(y=0.18)  # room for the labels, which are moved upwards
    _label_ends(axes, curves)
    axes.set_ylabel("reward")
    _add_legend(axes)


def _draw_gap(
    axes: Axes, records: Sequence[Record], key: str, tolerance_key: str, what: str
) -> None:
    """Draw the mean of a signal and its tolerance, if it has one."""
    _draw_curve(axes, records, key, color=BLUE, label=f"mean {what}")
    steps, tolerances = series(records, tolerance_key)
    if steps:
        axes.plot(steps, tolerances, "--", color=RED, linewidth=1.5, label="tolerance")
        _, gaps = series(records, key)
        top = 1.15 * max(*gaps, *tolerances) if gaps else None
        axes.set_ylim(bottom=0, top=top)
    _add_legend(axes)


def _draw_log_odds(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the quantiles in every bin of p_inf, over the first and the last tenth of the run: a bar
    from q25 to q75, a line from q1 to q99, and the median.
    """
    for is_last, color in ((False, GREY), (True, BLUE)):
        label = f"{'last' if is_last else 'first'} tenth of the run"
        for number, name in enumerate(CONFIDENCES):
            found = {q: tenth(records, f"discrepancy/{name}/q{q}", is_last) for q in QUANTILES}
            if None in found.values():
                continue
            place = number + (0.12 if is_last else -0.12)
            axes.vlines(place, found[1], found[99], color=color, linewidth=1.2)
            axes.vlines(place, found[25], found[75], color=color, linewidth=7, label=label)
            axes.plot(place, found[50], "o", color="white", markersize=3.5, zorder=3)
            label = None  # once in the legend
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    ranges = [name.removeprefix("log_odds_").replace("_to_", " to\n") for name in CONFIDENCES]
    axes.set_xticks(range(len(CONFIDENCES)), ranges, fontsize=8)
    axes.set_xlim(-0.6, len(CONFIDENCES) - 0.4)
    axes.set_xlabel("p_inf of the sampled token")
    axes.set_ylabel("logit p_train - logit p_inf")
    _add_legend(axes)


def tenth(records: Sequence[Record], key: str, is_last: bool) -> float | None:
    """The mean of a metric over the first or the last tenth of the steps that have it, at least
    one; None if no step has.
    """
    _, values = series(records, key)
    number = max(1, len(values) // 10)
    part = values[-number:] if is_last else values[:number]
    return sum(part) / len(part) if part else None


if __name__ == "__main__":
    sys.exit(main())
