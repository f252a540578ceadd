"""The last number of the answer must equal the expected number, as exact fractions: 0.5 is 1/2."""

from __future__ import annotations

from typing import Any

from megatron_rl.records import Score
from megatron_rl.reward.answers import final_answer, last_number


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """1 for the expected number, else 0; formatted if the response has a number.

    Raises:
        ValueError: the expected answer has no number.
    """
    expected = last_number(answer)
    if expected is None:
        raise ValueError(f"expected a number as the prompt's answer, got {answer!r}")
    said = last_number(final_answer(response))
    return Score(reward=float(said == expected), is_formatted=said is not None, failure=None)
