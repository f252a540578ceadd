"""The answer must equal the expected text, apart from white space around it."""

from __future__ import annotations

from typing import Any

from megatron_rl.records import Score
from megatron_rl.reward.answers import final_answer


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """1 for the expected text, else 0; formatted if there is any answer at all."""
    said = final_answer(response)
    return Score(reward=float(said == answer.strip()), is_formatted=bool(said), failure=None)
