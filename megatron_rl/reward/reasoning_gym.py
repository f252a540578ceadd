"""The scorer that a reasoning-gym task brings along; it may give part of a point.

The prompt's metadata holds what it needs: `{"task": name, "options": {...}, "entry": {...}}`, put
there by `data/reasoning_tasks.py`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import reasoning_gym

from megatron_rl.records import Score
from megatron_rl.reward.answers import final_answer, is_number

_GRID_TASKS = ("arc_agi", "rearc")  # compare grids with `==`, and JSON knows no tuples


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """What the task's `score_answer` says of the response's answer.

    Formatted: there is an answer, and it is a number where the expected one is.

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
