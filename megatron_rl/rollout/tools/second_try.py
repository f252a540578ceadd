"""A reasoning-gym task of several turns: the task's own scorer judges each answer, and the policy
may try again after a wrong one. A right answer ends the episode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_rl.records import Prompt

TRY_AGAIN = "That is not right. Try again."
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reply(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """TRY_AGAIN after an answer without the full score.

    Raises:
        ValueError: the prompt is not of a reasoning-gym task.
    """
    metadata = prompt.metadata
    if not {"task", "options", "entry"} <= metadata.keys():
        raise ValueError(f"expected a prompt of a reasoning-gym task, got one of {prompt.source}")
    answers = _ANSWER.findall(turns[-1])
    said = (answers[-1] if answers else turns[-1]).strip()
    dataset = _dataset(metadata["task"], json.dumps(metadata["options"]))
    return None if dataset.score_answer(said, metadata["entry"]) >= 1 else TRY_AGAIN


@lru_cache(maxsize=64)
def _dataset(task: str, options: str) -> Any:
    import reasoning_gym  # takes a second, and the other tools do not need it

    return reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(options))
