"""Draws the reward, the discrepancy with its tolerance, and lambda of a run into one PNG; also the
constrained signal, if it is another one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes

from megatron_rl.errors import DataError
from megatron_rl.observe.run_log import Record, read_metrics

SIGNAL = "constraint/signal/mean"
BLUE, ORANGE, RED, GREEN, GREY = "#2563a8", "#d9822b", "#c23b3b", "#2f8f5b", "#5f6b7a"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and draw the run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, help="PNG; default RUN_DIR/curves.png")
    options = parser.parse_args(arguments)
    output = options.output or options.run_dir / "curves.png"
    try:
        records = read_metrics(options.run_dir / "metrics.jsonl")
        if not records:
            raise DataError(f"{options.run_dir / 'metrics.jsonl'}: expected steps, got none")
        plot_run(records, output, title=str(options.run_dir))
    except (DataError, OSError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def plot_run(records: Sequence[Record], output: Path, *, title: str) -> None:
    """Write a PNG with three panels that share the axis of steps, or four if the constraint is on
    another signal than the discrepancy.

    Args:
        records: lines of a metrics.jsonl; a step without a key is left out of the curve.
        output: path of the PNG.
        title: of the figure.
    """
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "grid.color": "#e3e7ec",
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        has_signal = bool(series(records, SIGNAL)[0])
        heights = [1.3, 1.1, 1.1, 0.8] if has_signal else [1.3, 1.1, 0.8]
        figure, (reward, gap, *signal, dual) = pyplot.subplots(
            len(heights), 1, figsize=(8, 2.5 * sum(heights)), sharex=True, height_ratios=heights
        )
        _draw_reward(reward, records)
        _draw_gap(gap, records, "discrepancy/mean", "constraint/tolerance", "|p_train - p_inf|")
        gap.set_ylabel("discrepancy")
        for axes in signal:
            _draw_gap(axes, records, SIGNAL, "constraint/signal/tolerance", "constrained signal")
            axes.set_ylabel("signal")
        dual.plot(*series(records, "constraint/lambda"), color=ORANGE, linewidth=2)
        dual.set_ylabel("lambda")
        dual.set_xlabel("step")
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        figure.align_ylabels()
        figure.tight_layout()
        figure.savefig(output, dpi=150)
        pyplot.close(figure)


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
    axes.plot(steps, smooth(values, window), color=color, linewidth=2, label=label)


def _draw_reward(axes: Axes, records: Sequence[Record]) -> None:
    _draw_curve(axes, records, "reward/mean", color=BLUE, label="reward, training prompts")
    keys = sorted({k for record in records for k in record if k.startswith("eval/avg_at_")})
    for key in keys:
        steps, values = series(records, key)
        name = key.removeprefix("eval/").replace("_at_", "@")
        axes.plot(
            steps, values, "o--", color=GREEN, linewidth=1, markersize=7, label=f"{name}, held out"
        )
        for step, value in zip(steps, values):
            axes.annotate(
                f"{value:.2f}",
                (step, value),
                textcoords="offset points",
                xytext=(0, 9),
                ha="center",
                color=GREEN,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    axes.margins(y=0.18)
    axes.set_ylabel("reward")
    axes.legend(loc="lower right")


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
    axes.legend(loc="upper right", ncols=2)


if __name__ == "__main__":
    sys.exit(main())
