"""Finds the answer in a response, and the number in an answer; shared by the verifiers."""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
# An exponent of four digits would turn a few characters into a number of thousands of digits.
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
_NUMBER = re.compile(
    # A sign belongs to the number unless it is between two operands: -3 in "x = -3", 3 in "5-3".
    rf"(?P<sign>(?<![\w.)\]}}])[-+\u2212]\s*)?"
    rf"(?:\\[dt]?frac\s*{{\s*(?P<top>[-+]?{_DECIMAL})\s*}}\s*{{\s*(?P<bottom>[-+]?{_DECIMAL})\s*}}"
    rf"|(?P<numerator>{_DECIMAL})(?:\s*/\s*(?P<denominator>{_DECIMAL}))?)"
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(response: str) -> str:
    """The part of a response that is its answer, stripped of white space; "" if there is none.

    Only the text after the last `</think>` counts. In it, the answer is the last
    `<answer>...</answer>`, else the last `\\boxed{...}`, else all of it.
    """
    said = response.rpartition("</think>")[2]
    tagged = _ANSWER_TAG.findall(said)
    if tagged:
        return tagged[-1].strip()
    boxed = _last_boxed(said)
    return (said if boxed is None else boxed).strip()


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as an exact fraction; None if there is none.

    Reads 42, -3.5, 1,000, .5, 2e3, 3/4, \\frac{3}{4}; a dot, a dollar sign or a percent sign beside
    the number is ignored.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    numerator, denominator = last["top"] or last["numerator"], last["bottom"] or last["denominator"]
    try:
        value = _fraction(numerator) / (_fraction(denominator) if denominator else 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or x/0
        return None
    return -value if (last["sign"] or "").strip() in ("-", "\u2212") else value


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else."""
    match = _NUMBER.fullmatch(text.strip().rstrip("."))
    return match is not None and last_number(match[0]) is not None


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", ""))


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None
