"""An endless stream of candidates from a reasoning-gym task, as a function of (seed, position).

A data set of reasoning-gym has one seed and a fixed size. Positions are therefore divided into
chunks, and each chunk is a data set with a separate seed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import OrderedDict
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset

from megatron_rl.data.candidate import Candidate, Layout, read_candidate
from megatron_rl.data.mixture import derive_seed
from megatron_rl.errors import ConfigError

_CHUNK = 256  # prompts of one data set; some tasks make all of them in the constructor
_NUM_KEPT = 4  # data sets that are kept in memory


class ReasoningSource:
    """A reasoning-gym task with its options.

    Args:
        key: the setting that describes the questions, for messages.
        name_key: the key in it that names the task.

    Raises:
        ConfigError: the task or an option is unknown (the message names the nearest valid one), or
            the task does not accept the options.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        layout: Layout,
        *,
        key: str = "data.tasks[]",
        name_key: str = "name",
    ) -> None:
        self._name = name
        self._options = dict(options)
        self._layout = layout
        self._datasets: OrderedDict[int, Any] = OrderedDict()
        _check_task(name, key, name_key)
        _check_options(name, self._options, key)
        try:
            create_dataset(self._name, seed=0, size=1, **self._options)
        except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{key}: {self._name}: expected options that the task accepts, got "
                f"{self._options}: {error}"
            ) from error

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the questions depend on besides the settings, as plain JSON values."""
        return {"reasoning_gym": version("reasoning-gym")}

    def candidate(self, seed: int, position: int, attempt: int = 0) -> Candidate:
        """The question at a position; each attempt gives another question.

        Its metadata is what `reward/verifiers/reasoning_gym.py` needs to score an answer.

        Raises:
            DataError: a column is missing, or not a text.
        """
        chunk, place = divmod(position, _CHUNK)
        dataset = self._dataset(derive_seed(seed, chunk, attempt))
        # Recorded rollouts are JSON, which turns tuples into lists. The same is done here, so that
        # live and replayed prompts are equal.
        entry = json.loads(json.dumps(dataset[place]))
        metadata = {"task": self._name, "options": self._options, "entry": entry}
        # A task with several correct answers does not give an answer.
        record = {**entry, "answer": "" if entry["answer"] is None else entry["answer"]}
        return read_candidate(record, self._layout, f"task {self._name}", metadata)

    def _dataset(self, seed: int) -> Any:
        if seed not in self._datasets:
            self._datasets[seed] = create_dataset(
                self._name, seed=seed, size=_CHUNK, **self._options
            )
            if len(self._datasets) > _NUM_KEPT:
                self._datasets.popitem(last=False)
        return self._datasets[seed]


def _check_task(task: str, key: str, name_key: str) -> None:
    if task in DATASETS:
        return
    near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.0)
    # A set of the evaluation may have a name of its own.
    is_named_set = key.startswith("eval.") and name_key == "name"
    hint = "; write task: <name of the reasoning-gym task> beside it" * is_named_set
    raise ConfigError(
        f"{key}.{name_key}: expected a reasoning-gym task (or a path beside it), got "
        f"{task!r} (nearest: {', '.join(near)}){hint}"
    )


def _check_options(task: str, options: Mapping[str, Any], key: str) -> None:
    names = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for option in options:
        if option in ("seed", "size"):
            raise ConfigError(
                f"{key}: {task}: options.{option} is set by the stream of prompts: "
                "change data.seed and data.held_out_seed instead"
            )
        if option not in names:
            near = difflib.get_close_matches(option, names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}: {task}: unknown option {option!r} (nearest: {near})")
