"""`metrics.jsonl`: one line per step, flushed when written, truncated on resume.

A line reads `{"step": 12, "reward/mean": 0.41, "discrepancy/mean": 0.0041, ...}`. A value that is
not finite is written as null, because JSON cannot represent it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_rl.errors import DataError

Record = dict[str, float | None]


class RunLog:
    """Appends to the `metrics.jsonl` of a run; only one process may write it.

    Args:
        path: the file; created if it does not exist.
        keep_through: the last step whose line is kept. Lines of later steps are deleted, and so is
            an incomplete last line, which a killed process leaves. -1 starts an empty file.

    Raises:
        DataError: a line other than the last is not a JSON object with a `step`.
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
        """Append one line and flush it to the operating system."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; `write` must not be called afterwards."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[Record]:
    """The lines of a `metrics.jsonl` as dicts, in order; an empty list if there is no such file.

    An incomplete last line, which a killed process leaves, is skipped.

    Raises:
        DataError: any other line is not a JSON object with an integer `step`.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got byte {error.start}") from error
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
