"""Mathematical equality by the `math-verify` library: 1/2, 0.5 and \\frac12 are the same answer.

The library's own time limits are switched off: they use `signal.alarm`, which fails outside the
main thread, and then every answer scores 0. The worker pool limits the time instead.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import math_verify

from megatron_rl.records import Score

# The library warns that the caller must limit the time; the worker pool does so.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify(response: str, answer: str, metadata: dict[str, Any]) -> Score:
    """1 for an equal answer, else 0; formatted if the library could read an answer.

    Raises:
        ValueError: the expected answer cannot be read.
    """
    said = _parse(response.rpartition("</think>")[2])
    is_equal = math_verify.verify(_expected(answer), said, timeout_seconds=None)
    return Score(reward=float(is_equal), is_formatted=bool(said), failure=None)


@lru_cache(maxsize=1024)
def _expected(answer: str) -> list[Any]:
    is_marked = "\\boxed" in answer or "$" in answer
    parsed = _parse(answer if is_marked else f"\\boxed{{{answer}}}")
    if not parsed:
        raise ValueError(f"expected a mathematical answer, got {answer!r}")
    return parsed


def _parse(text: str) -> list[Any]:
    return math_verify.parse(text, parsing_timeout=None)
