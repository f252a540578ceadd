"""A user's own reward function, for models too small to be right: the share of digits.

Where the environment names a file, every call leaves a byte in it: so a test knows that a step is
past its rollouts and about to enter the learner.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

COUNT_VARIABLE = "MEGATRON_RL_TEST_SCORED"


def count_digits(response: str, answer: str, metadata: dict[str, Any]) -> float:
    if path := os.environ.get(COUNT_VARIABLE):
        with Path(path).open("ab") as file:
            file.write(b".")
    return sum(character.isdigit() for character in response) / max(1, len(response))


def even_answers_only(response: str, answer: str, metadata: dict[str, Any]) -> float:
    """Everything is right where the answer is odd: such a group has no signal."""
    return 1.0 if int(answer) % 2 else count_digits(response, answer, metadata)


def has_a_digit(response: str, answer: str, metadata: dict) -> float:
    """1 for a response with a digit among its first characters."""
    return float(any(character.isdigit() for character in response[:4]))
