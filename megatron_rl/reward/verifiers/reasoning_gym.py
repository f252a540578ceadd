"""The scorer that comes with a reasoning-gym task; it may give a fraction of the full reward.

It reads the prompt's metadata, `{"task": name, "options": {...}, "entry": {...}}`, which
`data/reasoning_tasks.py` writes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import reasoning_gym

from megatron_rl.records import Score
from megatron_rl.reward.answers import final_answer
from megatron_rl.reward.numbers import is_number

_GRID_TASKS = ("arc_agi", "rearc")  # they compare tuples of tuples, which JSON turned into lists


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """The score that the task's `score_answer` gives to the response's answer.

    The response is formatted if it has an answer, and a number if the expected answer is one.

    Raises:
        ValueError: the metadata is not of a reasoning-gym prompt.
    """
    missing = [key for key in ("task", "options", "entry") if key not in metadata]
    if missing:
        raise ValueError(
            f"expected the metadata of a reasoning-gym prompt, got none of {', '.join(missing)}: "
            "choose another data.tasks[].verifier for this source"
        )
    said = final_answer(response)
    entry = metadata["entry"]
    if metadata["task"] in _GRID_TASKS:
        grid = tuple(tuple(line) for line in entry["metadata"]["output"])
        entry = {**entry, "metadata": {**entry["metadata"], "output": grid}}
    dataset = _dataset(metadata["task"], json.dumps(metadata["options"]))
    reward = float(dataset.score_answer(said, entry))
    is_formatted = bool(said) and (is_number(said) or not is_number(answer))
    return Score(reward=reward, is_formatted=is_formatted, failure=None)


@lru_cache(maxsize=64)
def _dataset(task: str, options: str) -> Any:
    return reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(options))
