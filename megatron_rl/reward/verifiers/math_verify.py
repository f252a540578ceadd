"""Equality of numbers, formulas and texts: 1/2, 0.5 and \\frac12 are the same answer.

Two numbers compare exactly (`reward/numbers.py`), a formula with the `math-verify` library
(`reward/symbolic.py`), everything else as a text, apart from upper and lower case.

The library's own time limits are switched off: they use `signal.alarm`, which fails outside the
main thread, and then every answer scores 0. The worker pool limits the time instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_rl.records import Score
from megatron_rl.reward.answers import expected_answer, find_answer
from megatron_rl.reward.notation import text_key
from megatron_rl.reward.numbers import Number, read_number, same_number
from megatron_rl.reward.symbolic import read_formula, same_formula, same_value


@dataclass(frozen=True, slots=True)
class _Reading:
    number: Number | None
    formula: Any | None

    @property
    def is_text(self) -> bool:
        return self.number is None and self.formula is None


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """1 for an equal answer, else 0; formatted if it is a number or a formula, or a text as the
    expected answer is one.

    Raises:
        ValueError: the expected answer is empty.
    """
    right, found = expected_answer(answer), find_answer(response)
    if found.text and text_key(right) in map(text_key, (found.text, *found.readings)):
        return Score(reward=1.0, is_formatted=True, failure=None)
    expected = _read(right)
    for text in found.readings:
        said = _read(text)
        if not said.is_text:
            is_equal = _is_equal(expected, said)
            return Score(reward=float(is_equal), is_formatted=True, failure=None)
    is_formatted = bool(found.text) and expected.is_text
    return Score(reward=0.0, is_formatted=is_formatted, failure=None)


@lru_cache(maxsize=1024)
def _read(text: str) -> _Reading:
    number = read_number(text)
    return _Reading(number, read_formula(text) if number is None and text else None)


def _is_equal(expected: _Reading, said: _Reading) -> bool:
    if expected.number is not None and said.number is not None:
        return same_number(expected.number, said.number)
    if expected.is_text or said.is_text:
        return False
    if expected.number is not None:
        return same_value(said.formula, expected.number, is_expected=True)
    if said.number is not None:
        return same_value(expected.formula, said.number, is_expected=False)
    return same_formula(expected.formula, said.formula)
