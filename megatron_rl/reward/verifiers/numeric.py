"""The answer must be the expected number, as exact fractions: 0.5 is 1/2."""

from __future__ import annotations

from typing import Any

from megatron_rl.records import Score
from megatron_rl.reward.answers import find_answer
from megatron_rl.reward.expected import expected_number
from megatron_rl.reward.numbers import read_number, same_number


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """1 for the expected number, else 0; formatted if the answer is a number.

    Raises:
        ValueError: the expected answer is not a number.
    """
    expected = expected_number(answer)
    for text in find_answer(response).readings:
        said = read_number(text)
        if said is not None:
            is_equal = same_number(expected, said)
            return Score(reward=float(is_equal), is_formatted=True, failure=None)
    return Score(reward=0.0, is_formatted=False, failure=None)
