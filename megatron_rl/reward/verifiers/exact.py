"""The answer must be the expected text, apart from white space around it."""

from __future__ import annotations

from typing import Any

from megatron_rl.records import Score
from megatron_rl.reward.answers import expected_answer, final_answer


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """1 for the expected text, else 0; formatted if there is any answer at all.

    Raises:
        ValueError: the expected answer is empty.
    """
    expected = expected_answer(answer)
    said = final_answer(response)
    return Score(reward=float(said == expected), is_formatted=bool(said), failure=None)
