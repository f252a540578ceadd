"""The figures of every step of a study's runs, as the CSV of its report."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.study.figures import Record

PLACE = ("engine", "arm", "seed")  # of a run; first columns of the CSV
Curves = Mapping[tuple[str, str, int], Sequence[Record]]  # of a run's PLACE: its steps

# Metrics that the CSV has for every step; it has evaluations for the steps that made one.
COLUMNS = (
    "reward/mean",
    "discrepancy/mean",
    "discrepancy/kl_k3/mean",
    "constraint/tolerance",
    "constraint/lambda",
    "constraint/penalty_share/mean",
    "loss/entropy/mean",
    "learner/grad_norm",
    "speed/seconds/learner",
)


def read_csv(path: Path) -> Curves:
    """The runs of a CSV that `write_csv` has written, by engine, arm and seed.

    Raises:
        DataError: it cannot be read.
    """
    curves: dict[tuple[str, str, int], list[Record]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                run = (row.pop("engine"), row.pop("arm"), int(row.pop("seed")))
                record: Record = dict(zip(PLACE, run, strict=True), step=int(row.pop("step")))
                record |= {key: float(figure) for key, figure in row.items() if figure}
                curves.setdefault(run, []).append(record)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: expected the CSV of a report, got {error!r}") from error
    return curves


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Write one line per step: COLUMNS, and avg@k and the fixed rollouts' figures if evaluated."""
    wanted = ("eval/avg", "eval/fixed")
    evaluations = sorted({key for each in records for key in each if key.startswith(wanted)})
    fields = [*PLACE, "step", *COLUMNS, *evaluations]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for each in records:
            row = {key: f"{each[key]:.6g}" for key in each if isinstance(each[key], float)}
            writer.writerow(each | row)
