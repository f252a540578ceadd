"""Shows the figures of evaluation sets: lines below that of a step, and a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

HELD_OUT_LABEL = "held-out prompts"  # how the set without a name is called
MEAN_KEY, MEAN_LABEL = "eval/mean_of_sets", "mean of sets"
AT_K = re.compile(r"eval/(?:([^/]+)/)?(avg|pass)_at_(\d+)")  # keys of avg@k and pass@k
# A key that every set has, also one of which no response could be scored.
_OF_EVERY_SET = re.compile(r"eval/(?:([^/]+)/)?failure_rate/mean")


def figures_of_sets(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each evaluation set by the set's name ("": the held-out prompts), each without
    the beginning of its key: {"aime24": {"avg_at_32": 0.31, ...}}.
    """
    names = [
        match[1] or ""
        for key in metrics
        if (match := AT_K.fullmatch(key) or _OF_EVERY_SET.fullmatch(key))
    ]
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in metrics.items():
        topic, _, rest = key.partition("/")
        name, _, of_named = rest.partition("/")
        if topic == "eval" and name and name in found:
            found[name][of_named] = value
        elif topic == "eval" and "" in found:
            found[""][rest] = value
    return found


def evaluation_label(key: str) -> str:
    """`aime24 avg@32` of `eval/aime24/avg_at_32`, and `avg@8` of `eval/avg_at_8`."""
    match = AT_K.fullmatch(key)
    if match is None:
        raise ValueError(f"expected the key of avg@k or pass@k of an evaluation set, got {key!r}")
    name, kind, k = match.groups()
    return f"{name} {kind}@{k}" if name else f"{kind}@{k}"


def evaluation_lines(metrics: Mapping[str, float]) -> list[Text]:
    """A line for each named evaluation set and for their mean, for example:

    `  eval aime24  avg@32 0.312 +- 0.061  pass@8 0.533  pass@32 0.633  cut 0.021  tokens 9,412`.
    """
    sets = {name: figures for name, figures in figures_of_sets(metrics).items() if name}
    width = max(map(len, sets), default=0)
    lines = []
    for name, figures in sets.items():
        line = Text.assemble(("  eval ", "dim"), (f"{name:<{width}}", "bold"))
        for what, value in _rates(figures):
            line.append(f"  {what} ", "dim").append(f"{value:.3f}", "bold magenta")
            if what.startswith("avg") and "standard_error" in figures:
                line.append(f" +- {figures['standard_error']:.3f}", "dim")
        for key, what, form in (
            ("truncation_rate/mean", "cut", ".3f"),
            ("response_tokens/mean", "tokens", ",.0f"),
        ):
            if key in figures:
                line.append(f"  {what} ", "dim").append(f"{figures[key]:{form}}")
        lines.append(line)
    if MEAN_KEY in metrics:
        line = Text.assemble(("  eval ", "dim"), (MEAN_LABEL, "bold"), ("  avg ", "dim"))
        lines.append(line.append(f"{metrics[MEAN_KEY]:.3f}", "bold magenta"))
    return lines


def evaluation_table(metrics: Mapping[str, float], *, title: str) -> Table:
    """A table with a row for each evaluation set, and one for the mean of the named ones."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    columns = {
        "+-": ("standard_error", ".3f"),
        "formatted": ("format_rate/mean", ".3f"),
        "cut": ("truncation_rate/mean", ".3f"),
        "failed": ("failure_rate/mean", ".3f"),
        "tokens": ("response_tokens/mean", ",.0f"),
    }
    for heading in ("avg@k", "+-", "pass@k", *list(columns)[1:]):
        table.add_column(heading, justify="right")
    for name, figures in figures_of_sets(metrics).items():
        average, *passes = [f"{what} {value:.3f}" for what, value in _rates(figures)] or [""]
        cells = [
            f"{figures[key]:{form}}" if key in figures else "" for key, form in columns.values()
        ]
        table.add_row(name or HELD_OUT_LABEL, average, cells[0], "\n".join(passes), *cells[1:])
    if MEAN_KEY in metrics:
        table.add_row(MEAN_LABEL, f"{metrics[MEAN_KEY]:.3f}")
    return table


def _rates(figures: Mapping[str, float]) -> list[tuple[str, float]]:
    """avg@k, then pass@k by k, with their values."""
    found = [match for key in figures if (match := AT_K.fullmatch(f"eval/{key}"))]
    found.sort(key=lambda match: (match[2], int(match[3])))
    return [
        (evaluation_label(match[0]), figures[match[0].removeprefix("eval/")]) for match in found
    ]
