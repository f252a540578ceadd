"""Compares two runs bit for bit: all contents of their folders except times.

    python tools/compare_runs.py runs/first runs/second

It compares settings, metrics, the checkpoints' tensors and state, and the Hugging Face export.
Floats are compared by their bits, metrics by their digits in metrics.jsonl (which distinguish all
float64 values), and files of the export also by their bytes. An item that only one run has is a
difference. Settings are an exception, because only one of two commits may have a setting; such
settings are listed.

A metric is a time if its key begins with `speed/`, or if one of its words is `time`, `second`,
`seconds`, `ms` or `duration`. Settings that contain paths are not compared either, nor are the file
sizes and the inputs in a checkpoint's run_state.json; the inputs repeat the settings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_rl.errors import DataError
from megatron_rl.learner.model.checkpoint_sums import SUMS
from megatron_rl.process.tool import run_tool
from megatron_rl.weights.conversion.metadata import without_code

PLACES = re.compile(r"settings/(run_dir|replay|model\.path|data\.tasks\.\d+\.path(\.\d+)?)")
TIME_WORDS = {"time", "second", "seconds", "ms", "duration"}
ABSENT = "absent"
MAX_NAMES = 8  # largest number of differences that the report names in each part

Value = torch.Tensor | bytes | tuple[str, ...]
Contents = dict[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One difference. Example: `Difference(name="metrics/loss/mean", place="line 3", before="0.5",
    after="0.6")`; the place is "" if the whole value is missing or of a different kind.
    """

    name: str
    place: str
    before: str
    after: str

    def __str__(self) -> str:
        place = f" {self.place}" if self.place else ""
        return f"{self.name}{place}: {self.before} became {self.after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of a comparison. Example: `Comparison(differences=(), num_tensors=61,
    num_metrics=80, num_others=300, times=("speed/seconds/learner",),
    new_settings=("sync.transport",))`.
    """

    differences: tuple[Difference, ...]
    num_tensors: int
    num_metrics: int
    num_others: int
    times: tuple[str, ...]  # the metrics that were not compared
    new_settings: tuple[str, ...]  # the settings that only one of the runs has

    @property
    def summary(self) -> str:
        """The result in one line, e.g. `same bits: 61 tensors, 80 metrics, 300 other values`."""
        of_all = f"{self.num_tensors} tensors, {self.num_metrics} metrics, {self.num_others} others"
        if not self.differences:
            return f"same bits: {of_all}"
        return f"{len(self.differences)} DIFFER of {of_all}"


def compare_runs(before: Path, after: Path) -> Comparison:
    """Compare all contents of two run folders except times."""
    first, second = read_run(before), read_run(after)
    times = sorted({name for each in (first, second) for name in each if is_time(name)})
    new = [name for name in first.keys() ^ second.keys() if name.startswith("settings/")]
    for each in (first, second):
        for name in (*times, *new):
            each.pop(name, None)
    names = list(first | second)
    is_metric = {name: name.startswith("metrics/") for name in names}
    is_tensor = {
        name: any(isinstance(each.get(name), torch.Tensor) for each in (first, second))
        for name in names
    }
    return Comparison(
        differences=tuple(differences(first, second)),
        num_tensors=sum(is_tensor.values()),
        num_metrics=sum(is_metric.values()),
        num_others=len(names) - sum(is_tensor.values()) - sum(is_metric.values()),
        times=tuple(name.removeprefix("metrics/") for name in times),
        new_settings=tuple(sorted(name.removeprefix("settings/") for name in new)),
    )


def is_time(name: str) -> bool:
    """Whether `metrics/<key>` is a time; see the docstring of this module."""
    part, _, key = name.partition("/")
    words = re.split(r"[^a-z]+", key.lower())
    return part == "metrics" and (key.startswith("speed/") or not TIME_WORDS.isdisjoint(words))


def report_lines(comparison: Comparison) -> list[str]:
    """For each part of the run folder, the first difference and the names of further ones."""
    parts: dict[str, list[Difference]] = {}
    for each in comparison.differences:
        parts.setdefault(each.name.split("/")[0], []).append(each)
    lines = []
    for part, found in parts.items():
        lines.append(str(found[0]))
        names = [each.name for each in found[1 : MAX_NAMES + 1]]
        # Items that are missing on one side are always named, because they may have been renamed.
        one_sided = [each for each in found[MAX_NAMES + 1 :] if ABSENT in (each.before, each.after)]
        names += [each.name for each in one_sided]
        more = len(found) - 1 - len(names)
        names = [name.removeprefix(f"{part}/") for name in names]
        if names:
            lines.append(f"  and {', '.join(names)}" + (f" and {more} more" if more else ""))
    return lines


def differences(before: Mapping[str, Value], after: Mapping[str, Value]) -> list[Difference]:
    """The differences in the order of the contents. Metrics are sorted by the line in which they
    first differ, followed by metrics that only one side has.
    """
    found = []
    for name in dict(before) | dict(after):
        if name in before and name in after:
            difference = first_difference(name, before[name], after[name])
        else:
            shown = [
                f"{kind_of(each[name])}" if name in each else ABSENT for each in (before, after)
            ]
            difference = Difference(name=name, place="", before=shown[0], after=shown[1])
        if difference is not None:
            found.append(difference)
    return sorted(found, key=_line_of)


def _line_of(difference: Difference) -> tuple[int, int]:
    """A sort key: settings first, then metrics by line, then everything else."""
    part = difference.name.split("/")[0]
    rank = {"settings": 0, "metrics": 1}.get(part, 2)
    line = re.fullmatch(r"line (\d+)", difference.place)
    return rank, int(line[1]) if line else sys.maxsize


def first_difference(name: str, before: Value, after: Value) -> Difference | None:
    """The first difference between two values of one name; None if all their bits are equal."""
    if kind_of(before) != kind_of(after):
        return Difference(name=name, place="", before=kind_of(before), after=kind_of(after))
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return _first_in_tensor(name, before, after)
    if isinstance(before, bytes):
        place = "byte {}"
    else:
        place = "line {}" if name.startswith("metrics/") else "item {}" if len(before) > 1 else ""
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        if one != other:
            return Difference(
                name=name, place=place.format(index), before=str(one), after=str(other)
            )
    return None


def _first_in_tensor(name: str, before: torch.Tensor, after: torch.Tensor) -> Difference | None:
    one, other = bits_of(before), bits_of(after)
    is_other = (one != other).any(dim=1)
    if not is_other.any():
        return None
    index = int(is_other.int().argmax())
    place = torch.unravel_index(torch.tensor(index), before.shape) if before.dim() else ()
    where = f"[{', '.join(str(int(each)) for each in place)}]"
    share = f"{int(is_other.sum())} of {len(is_other)} elements, first {where}"
    values = [repr(each.reshape(-1)[index].item()) for each in (before, after)]
    if values[0] == values[1]:  # NaNs with different bits
        values = [bytes(each[index].tolist()).hex() for each in (one, other)]
    return Difference(name=name, place=share, before=values[0], after=values[1])


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: [number of elements, bytes per element] uint8."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), tensor.element_size())


def kind_of(value: Value) -> str:
    """The type and shape, which must be equal before values can be compared item by item."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{len(value)} lines" if len(value) > 1 else "a value"


def read_run(run_dir: Path) -> Contents:
    """All compared values by name: settings, metrics, checkpoints, export."""
    contents = flat("settings", yaml.safe_load((run_dir / "config.yaml").read_text()))
    contents |= read_metrics(run_dir / "metrics.jsonl")
    for name in ("checkpoints", "huggingface"):
        if not (run_dir / name).is_dir():
            raise FileNotFoundError(f"{run_dir}: expected the folder {name} of a finished run")
        contents |= read_folder(run_dir / name, name)
    return {name: value for name, value in contents.items() if not PLACES.fullmatch(name)}


def read_metrics(path: Path) -> Contents:
    """The text of each metric in every line, by `metrics/<key>`.

    Raises:
        DataError: a line is no JSON object.
    """
    lines = []
    try:
        for line in path.read_text().splitlines():
            values = json.loads(line, parse_float=str, parse_int=str, parse_constant=str)
            lines.append(dict(values))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}, line {len(lines) + 1}: expected a JSON object, got {error}"
        ) from error
    keys = dict.fromkeys(key for line in lines for key in line)
    return {f"metrics/{key}": tuple(str(line.get(key, ABSENT)) for line in lines) for key in keys}


def read_folder(folder: Path, name: str) -> Contents:
    """All files in the folder. A distributed checkpoint is represented by its full tensors."""
    contents: Contents = {}
    for path in sorted(folder.iterdir()):
        below = f"{name}/{path.name}"
        if path.is_dir():
            contents |= read_folder(path, below)
        elif path.name == ".metadata":
            contents |= read_shards(folder, name)
        elif path.suffix == ".distcp" or path.name == SUMS:
            pass  # the shards of a checkpoint that has been read, and the sums of its files
        elif path.suffix == ".pt":
            contents |= flat(below, torch.load(path, map_location="cpu", weights_only=True))
        elif path.name == "run_state.json":
            state = json.loads(path.read_text())
            for inputs in ("inputs", "data"):  # data: of older commits
                state["run"].pop(inputs, None)
            contents |= flat(below, {key: value for key, value in state.items() if key != "bytes"})
        else:
            if path.suffix == ".safetensors":
                contents |= {f"{below}/{key}": value for key, value in load_file(path).items()}
            contents[below] = path.read_bytes()
    return contents


def read_shards(folder: Path, name: str) -> Contents:
    """The contents of a distributed checkpoint by name: weights, main weights, moments and more."""
    state: dict[str, Any] = {}
    with without_code():
        _load_state_dict(
            state,
            storage_reader=FileSystemReader(folder),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
    return flat(name, state)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face checkpoint, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def flat(name: str, value: Any) -> Contents:
    """Flatten nested dicts and lists to one dict with keys `name/dotted.key`. Values that are not
    tensors are represented by their repr.
    """
    return {f"{name}/{key.removeprefix('.')}": inner for key, inner in _dotted("", value).items()}


def _dotted(name: str, value: Any) -> Contents:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items: dict[object, Any] = {}
    if isinstance(value, Mapping):
        items = dict(value)
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value))
    if not items:
        return {name: (repr(value),)}
    contents: Contents = {}
    for key, inner in items.items():
        contents |= _dotted(f"{name}.{key}", inner)
    return contents


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a run folder")
    parser.add_argument("after", type=Path, help="another run folder")
    options = parser.parse_args(arguments)
    return run_tool("compare_runs", lambda: _compare(options.before, options.after), code=2)


def _compare(before: Path, after: Path) -> int:
    comparison = compare_runs(before, after)
    print("\n".join([comparison.summary, *report_lines(comparison)]))
    print(f"not compared, as times: {', '.join(comparison.times)}")
    print(f"settings of one run only: {', '.join(comparison.new_settings) or 'none'}")
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(main())
