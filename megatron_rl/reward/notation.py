"""Brings an answer's LaTeX, Unicode and Markdown to one form, in which the readers of numbers,
expressions and texts look for their patterns.
"""

from __future__ import annotations

import re

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
    "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_SIGNS = {
    "\u2212": "-",  # minus
    "\ufe63": "-",
    "\uff0d": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": "/",
    "\u2044": "/",
    "\u221a": r"\sqrt ",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u00b0": r"^\circ ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2248": r"\approx ",
    "\u00b1": r"\pm ",
    "\u222a": r"\cup ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\uff05": "%",
    "\u2019": "'",
} | {chr(0xFF10 + digit): str(digit) for digit in range(10)}  # full-width digits
_TRANSLATION = str.maketrans(_SIGNS | {sign: f" {text} " for sign, text in _FRACTIONS.items()})
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_NO_WIDTH = re.compile(r"\\!|\\(?:left|right|displaystyle|textstyle|limits)(?![a-zA-Z])")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|[\s\u00a0\u2007\u2009\u202f])+")
_ANY_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm|operatorname)"
    r"\s*\{((?>[^{}]*(?:\{[^{}]*\}[^{}]*)*))\}"
)
_MAX_LENGTH = 2000  # characters of a text that is brought to one notation
_QUOTES = "\"'\u201c\u201d"
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))


def plain(answer: str) -> str:
    """The answer in one notation.

    - Delimiters of mathematics and Markdown around the whole, and punctuation behind it, are taken
      away; every kind of space becomes one space; `\\text{cm}` and its like become ` cm `.
    - Fractions are `\\frac` or `/`, thousands are separated by `,` or one space, minus is `-`.
    - Unicode signs become their LaTeX command: `π` is `\\pi`, `10⁵` is `10^{5}`, `2½` is `2 1/2`.
    """
    text = _RAISED.sub(lambda found: _script("^", found[0], _SUPERSCRIPTS), answer)
    text = _LOWERED.sub(lambda found: _script("_", found[0], _SUBSCRIPTS), text)
    text = text.translate(_TRANSLATION)
    text = _NO_WIDTH.sub("", text)
    text = _ANY_FRACTION.sub(r"\\frac", text).replace("{,}", ",")
    for _ in range(3):  # nested, as in \text{\textbf{a}}
        text, num_replaced = _TEXT.subn(r" \1 ", text)
        if not num_replaced:
            break
    return without_delimiters(_SPACE.sub(" ", text))


def text_key(answer: str) -> str:
    """What two answers have in common if they are the same text, apart from upper and lower case,
    notation, and parentheses around the letter of a choice: "(B)" and "b".
    """
    if len(answer) > _MAX_LENGTH:
        return answer.strip()
    text = re.sub(r"([_^])\s?\{\s?(\w+)\s?\}(?!\w)", r"\1\2", plain(answer)).strip(_QUOTES)
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)  # not "2 2/3"
    choice = re.fullmatch(r"\(?\s?([A-Za-z])\s?\)?", text)
    return (choice[1] if choice else text).casefold()


def without_delimiters(text: str) -> str:
    """A text without white space, delimiters of mathematics and Markdown around the whole of it,
    and punctuation at its end.
    """
    while True:
        shorter = text.strip().rstrip(".,;:").strip()
        for opening, closing in _DELIMITERS:
            inner = shorter[len(opening) : -len(closing)]
            is_delimited = shorter.startswith(opening) and shorter.endswith(closing)
            others = inner.replace("\\$", "")
            if is_delimited and inner.strip() and opening not in others and closing not in others:
                shorter = inner
        if shorter == text:
            return text
        text = shorter


def _script(sign: str, found: str, characters: dict[str, str]) -> str:
    return f"{sign}{{{''.join(characters[each] for each in found)}}}"
