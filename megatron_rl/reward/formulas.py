"""Finds the numbers and formulas in running text, each with everything that belongs to it.

A formula is a piece of mathematics between delimiters, or a row of tokens of which one has a digit
and none is an ordinary word. Signs, other numbers and joining words beside a number belong to it:
"2 2/3", "12:30", "3 million", "3 or 4", "5 feet 3 inches". A reader of the formula then sees all of
it, and does not take a part of it for the answer.
"""

from __future__ import annotations

import re

from megatron_rl.reward.notation import without_delimiters
from megatron_rl.reward.words import CONNECTIVES, MEASURES, VALUES

# A dollar sign that opens mathematics has no space behind it; one that closes it has none before it
# and no digit behind it. So "$5 and $6" is not mathematics.
_MATH = re.compile(
    r"\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\]|\$\$[^$]{1,500}\$\$|\$(?![\s$])[^$]{1,500}?(?<!\s)\$(?!\d)"
)
_TOKEN = re.compile(rf"(?:{_MATH.pattern})[^\s\w]*|\S+")
_SIGNS = re.compile(r"(?:[-+*/^=<>|!%()\[\]{}$\u00d7\u00f7\u2212\u2248~]|\\[a-zA-Z]+)+")
_QUOTES = "\"'`\u201c\u201d"
_STOPS = (",", ";", ":", ".", "?")
_BULLETS = ("-", "*", "+")


def formulas_in(text: str) -> list[str]:
    """The formulas of a text, in order."""
    found: list[str] = []
    for line in text.splitlines():
        tokens = [token.strip(_QUOTES) for token in _TOKEN.findall(line)]
        if tokens[:1] and tokens[0] in _BULLETS:
            del tokens[0]
        kinds = [_kind(token) for token in tokens]
        found += [_joined(tokens[start:end]) for start, end in _spans(tokens, kinds)]
    return found


def _kind(token: str) -> str:
    """What a token of a text is: "formula", "sign", "connective", "value", "letter" or "word"."""
    bare = token.strip("*_").rstrip("".join(_STOPS))
    if any(character.isnumeric() for character in bare):
        return "formula"
    if _MATH.match(bare):  # "$n$" is a name, not an answer
        return "letter" if re.fullmatch(r"\W*(?:\\[a-zA-Z]+|\w)\W*", bare) else "formula"
    if bare and _SIGNS.fullmatch(bare):
        return "sign"
    if bare.lower() in CONNECTIVES:
        return "connective"
    if bare.lower() in VALUES:
        return "value"
    return "letter" if len(bare) == 1 and bare.isalpha() else "word"


def _spans(tokens: list[str], kinds: list[str]) -> list[tuple[int, int]]:
    """First token and token after the last one of each formula."""
    spans: list[tuple[int, int]] = []
    start = None
    for place in range(len(tokens) + 1):
        if start is not None and (
            place == len(tokens) or kinds[place] == "word" or tokens[place - 1].endswith(_STOPS)
        ):
            span = _trimmed(tokens, kinds, start, place)
            if span is not None and spans and _is_one_amount(tokens, spans[-1], span):
                spans[-1] = (spans[-1][0], span[1])
            elif span is not None:
                spans.append(span)
            start = None
        if start is None and place < len(tokens) and kinds[place] != "word":
            start = place
    return spans


def _trimmed(tokens: list[str], kinds: list[str], start: int, end: int) -> tuple[int, int] | None:
    """A row of tokens without those at its ends that belong to the sentence; None if there is no
    formula in it.
    """
    if "formula" not in kinds[start:end]:
        return None
    while (kinds[start] == "connective" and tokens[start].lower() != "minus") or (
        kinds[start] in ("letter", "value") and kinds[start + 1] not in ("sign", "connective")
    ):
        start += 1
    while kinds[end - 1] == "connective" or (
        kinds[end - 1] == "letter" and kinds[end - 2] not in ("sign", "connective")
    ):
        end -= 1
    return start, end


def _is_one_amount(tokens: list[str], before: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether two formulas with few words between them are one amount: "5 feet 3 inches", "3 apples
    and 4 pears".
    """
    between = tokens[before[1] : span[0]]
    has_stop = any(token.endswith(_STOPS) for token in tokens[before[1] - 1 : span[0]])
    if has_stop or not 1 <= len(between) <= 3:
        return False
    is_measure = len(between) == 1 and between[0].lower() in MEASURES
    return is_measure or between[-1].lower() == "and"


def _joined(tokens: list[str]) -> str:
    return without_delimiters(" ".join(tokens).replace("**", ""))
