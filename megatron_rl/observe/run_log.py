"""`metrics.jsonl`: a line a step, flushed as it is written, cut back on resume.

A line reads `{"step": 12, "reward/mean": 0.41, "discrepancy/mean": 0.0041, ...}`. A value that is
not finite is written as null, since JSON has no word for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from megatron_rl.errors import DataError

Record = dict[str, float | None]


class RunLog:
    """Appends to a run's `metrics.jsonl`; one process writes it.

    Args:
        path: the file; made if it is not there.
        keep_through: the last step that stays; lines of later steps are dropped, as is a last line
            that a killed process left torn. -1 starts afresh.

    Raises:
        DataError: a line before the last is not a JSON object with a `step`.
    """

    def __init__(self, path: str | Path, *, keep_through: int) -> None:
        self.path = Path(path)
        kept = [r for r in read_metrics(self.path) if r["step"] <= keep_through]
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and hands it to the operating system."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[Record]:
    """The lines of a `metrics.jsonl` as dicts, in order; none if there is no such file.

    A torn last line is left out: it is what a killed process leaves.

    Raises:
        DataError: any other line is not a JSON object with an integer `step`.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}:{number}: expected a JSON object, got {line[:60]!r}"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError(f"{path}:{number}: expected an object with a step, got {line[:60]!r}")
        records.append(record)
    return records
