"""How often the parity probe is wrong, from the log-probs of real runs.

    python tools/probe_power.py record FILE.npz CONFIG [key=value ...]
    python tools/probe_power.py table FILE.npz ...

`record` trains on one rank with one engine, and in place of the probe records, after every update,
the log-probs of 48 short samples: the engine's when it sampled them, and those of both sides before
and after the next update; the engine's before it twice, of which the second stands for an engine
that kept its old weights. `table` draws the probe's tokens from them, decides with the probe's own
code, 1,000 times for a sound update and 1,000 times for a stale engine of one update, and counts.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import megatron_rl.train
from megatron_rl.errors import DataError
from megatron_rl.loop.parity import FIRST_GIVEN, MORE, NEW, OLD, PROMPTS, ParityProbe, given_tokens
from megatron_rl.process.command import run_command
from megatron_rl.process.tool import run_tool
from megatron_rl.records import Sample
from megatron_rl.sync.change import Scores, compare_changes
from megatron_rl.sync.probe import ParityReport, Precisions, compare

NUM_SEQUENCES = PROMPTS * (1 + MORE) + PROMPTS
NUM_DECISIONS = 1000
# Columns of the two tables of a file, a row for each token: of the given tokens, and of the sampled
# ones. All log-probs are float32.
GIVEN = ("learner_before", "engine_before", "engine_again", "learner_after", "engine_after")
SAMPLED = ("engine_sampled", "learner_same", "learner_next")


class Recorder(ParityProbe):
    """Records instead of deciding; see `record`."""

    path = Path()  # of the file

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._samples: list[Sample] = []
        self._same: dict[int, torch.Tensor] = {}
        self._again: dict[int, torch.Tensor] = {}
        self._columns: dict[str, list[np.ndarray]] = {}

    def check(self, version: int, checksum: str) -> dict[str, float]:
        """Record the update, and take new samples for the next one."""
        samples = numbered(self._sample(version, 0, NUM_SEQUENCES, 0), NEW)
        new = given_tokens(samples)
        scores, again = self._score([*self._given, *new]), self._score(new)
        learned = {
            (sample.prompt_index, sample.sample_index): values
            for sample, values in self._learned([*self._samples, *samples])
        }
        for index, before in self._before.items():
            after = scores[index, OLD]
            engine_again = self._again[index]
            values = before.learner, before.engine, engine_again, after.learner, after.engine
            self._add(version, index, dict(zip(GIVEN, values, strict=True)))
        for index, sample in enumerate(self._samples):
            served = torch.from_numpy(sample.rollout.rollout_logprobs)
            mask = torch.from_numpy(sample.rollout.loss_mask)
            values = served[mask], self._same[index][mask], learned[index, OLD][mask]
            self._add(version, index, dict(zip(SAMPLED, values, strict=True)))
        self._samples, self._given = numbered(samples, OLD), numbered(new, OLD)
        self._same = {index: values for (index, age), values in learned.items() if age == NEW}
        self._before = {index: each for (index, age), each in scores.items() if age == NEW}
        self._again = {index: each.engine for (index, _), each in again.items()}
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        precisions = {"engine": self._precisions.engine, "learner": self._precisions.learner}
        np.savez_compressed(self.path, **precisions, **columns)
        return {}

    def _add(self, version: int, index: int, values: dict[str, torch.Tensor]) -> None:
        """Append a row for each token of a sequence; its columns are named after the first one."""
        table = next(iter(values))
        length = next(iter(values.values())).numel()
        rows = {name: each.numpy().astype(np.float32) for name, each in values.items()}
        rows[f"{table}/update"] = np.full(length, version, dtype=np.int16)
        rows[f"{table}/sequence"] = np.full(length, index, dtype=np.int16)
        for name, part in rows.items():
            self._columns.setdefault(name, []).append(part)


def numbered(samples: Sequence[Sample], age: int) -> list[Sample]:
    """The samples with their places in the list as prompt index, and their age."""
    return [
        replace(sample, prompt_index=index, sample_index=age)
        for index, sample in enumerate(samples)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The sequences of one file: `given[u][g]` and `sampled[u][g]` are the columns of sequence g
    of update u, [L] float64 each.
    """

    given: list[list[dict[str, torch.Tensor]]]
    sampled: list[list[dict[str, torch.Tensor]]]
    precisions: Precisions


def read(path: Path) -> Recorded:
    """The contents of a file that `record` wrote."""
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in file.files}
    except (ValueError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: expected a file of `record`, got another one") from error
    return Recorded(
        given=_sequences(columns, GIVEN),
        sampled=_sequences(columns, SAMPLED),
        precisions=Precisions(
            engine=str(columns["engine"]), learner=str(columns["learner"]), tolerance=0.0
        ),
    )


def _sequences(
    columns: dict[str, np.ndarray], names: Sequence[str]
) -> list[list[dict[str, torch.Tensor]]]:
    updates, sequences = columns[f"{names[0]}/update"], columns[f"{names[0]}/sequence"]
    values = {name: torch.from_numpy(columns[name]).double() for name in names}
    return [
        [
            {
                name: each[(updates == update) & (sequences == number)]
                for name, each in values.items()
            }
            for number in np.unique(sequences[updates == update])
        ]
        for update in np.unique(updates)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the probe decides on drawn tokens.

    Example: `Decision(is_stale=True, is_off=False, asked_again=True, was_off=False)`.
    """

    is_stale: bool  # by the change of given tokens
    is_off: bool  # by the gap of new samples
    asked_again: bool
    was_off: bool  # the mean gap of the first tokens is above the bound, in float32 any token's


def decide(recorded: Recorded, *, is_stale: bool, rng: np.random.Generator) -> Decision:
    """Draw an update and sequences of it, and decide as `loop/parity.py` does.

    Args:
        is_stale: the engine kept the weights of the update before.
    """
    update = rng.integers(len(recorded.given))
    given = [recorded.given[update][i] for i in _draw(rng, recorded.given[update], PROMPTS)]
    drawn = [
        recorded.sampled[update][i]
        for i in _draw(rng, recorded.sampled[update], PROMPTS * (1 + MORE))
    ]
    engine_after = "engine_again" if is_stale else "engine_after"
    learner = "learner_next" if is_stale else "learner_same"
    exact = recorded.precisions.learner == "float32"

    def changed(sequences: Sequence[dict[str, torch.Tensor]]) -> bool:
        return compare_changes(
            [Scores(learner=s["learner_before"], engine=s["engine_before"]) for s in sequences],
            [Scores(learner=s["learner_after"], engine=s[engine_after]) for s in sequences],
            has_new_bytes=True,
            is_exact_learner=exact,
        ).is_stale

    def gap(sequences: Sequence[dict[str, torch.Tensor]]) -> ParityReport:
        engine = [s["engine_sampled"] for s in sequences]
        return compare(engine, [s[learner] for s in sequences], recorded.precisions)

    first = gap(drawn[:PROMPTS])
    asked_again = changed(given[:FIRST_GIVEN]) or first.is_above
    if not asked_again:
        return Decision(is_stale=False, is_off=False, asked_again=False, was_off=first.is_above)
    if recorded.precisions.is_exact:
        is_off = first.is_certain and gap(drawn[PROMPTS:]).is_certain
    else:
        is_off = gap(drawn).is_certain
    return Decision(
        is_stale=changed(given), is_off=is_off, asked_again=True, was_off=first.is_above
    )


def _draw(rng: np.random.Generator, sequences: Sequence[Any], count: int) -> np.ndarray:
    return rng.choice(len(sequences), min(count, len(sequences)), replace=False)


def table(paths: Sequence[Path]) -> list[str]:
    """The lines of a Markdown table with two rows for each file."""
    lines = [
        "| engine, learner | update | learner's change | engine's change | mean gap | run ended | "
        "ended by the gap of 48 tokens alone | asked again |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for path in paths:
        recorded, rng = read(path), np.random.default_rng(0)
        for is_stale in (False, True):
            found = [decide(recorded, is_stale=is_stale, rng=rng) for _ in range(NUM_DECISIONS)]
            counts = [
                sum(map(test, found))
                for test in (
                    lambda each: each.is_stale or each.is_off,
                    lambda each: each.was_off,
                    lambda each: each.asked_again,
                )
            ]
            lines.append(_row(recorded, is_stale, counts))
    return lines


def _row(recorded: Recorded, is_stale: bool, counts: Sequence[int]) -> str:
    given = [each for update in recorded.given for each in update]
    sampled = [each for update in recorded.sampled for each in update]
    after = "engine_again" if is_stale else "engine_after"
    change = torch.cat([each["learner_after"] - each["learner_before"] for each in given])
    of_engine = torch.cat([each[after] - each["engine_before"] for each in given])
    learner = "learner_next" if is_stale else "learner_same"
    gap = torch.cat(
        [(each["engine_sampled"].exp() - each[learner].exp()).abs() for each in sampled]
    )
    name = f"{recorded.precisions.engine}, {recorded.precisions.learner}"
    cells = [
        name,
        "stale engine" if is_stale else "sound",
        f"{float(change.square().mean().sqrt()):.3f}",
        f"{float(of_engine.square().mean().sqrt()):.3f}",
        f"{float(gap.mean()):.4f}",
        *(f"{count:,}" for count in counts),
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train, and record log-probs")
    recording.add_argument("file", type=Path)
    recording.add_argument("arguments", nargs="+", metavar="CONFIG [key=value ...]")
    counting = commands.add_parser("table", help="decide on recorded log-probs")
    counting.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(argv)
    if options.command == "table":
        return run_tool("probe_power", lambda: print("\n".join(table(options.files))))
    Recorder.path = options.file
    with mock.patch.object(megatron_rl.train, "ParityProbe", Recorder):
        return run_command("Record.", megatron_rl.train.train, options.arguments)


if __name__ == "__main__":
    sys.exit(main())
