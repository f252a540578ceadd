"""Reads the number that an answer consists of, as an exact fraction.

The whole answer must be one number in a notation of numbers, or there is no number: a reader that
skips what it does not know reads another number than the one written. Notations are

    -3.5   .5   1,000   1{,}000   1 000   1,00,000   2e3   0.\\overline{3}
    3/4   \\frac{3}{4}   \\frac34   2 2/3   2\\frac{2}{3}   10^5   2^{-60}   3 \\times 10^4
    five   twenty-one   3 million   50\\%   \\$5   5\\text{ cm}^2   12 red apples   x = 5

A calculation (`2+3`, `5!`, `\\sqrt{4}`) is not a notation of a number: a verifier that calculated
would take a repetition of the question for its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_rl.reward.notation import plain
from megatron_rl.reward.words import SCALES, is_unit, read_cardinal

_MAX_LENGTH = 1000  # characters of an answer
_MAX_BITS = 20_000  # of a power; 10^5000 has 16,610

_WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+"
_DECIMAL = rf"(?:(?:{_WHOLE})(?:\.\d+)?|\.\d+)"
_SIGNED = rf"\s*[-+]?\s*{_DECIMAL}\s*"
_SIMPLE_FRACTION = (  # \frac{3}{4}, \frac34, \frac{3}4
    rf"\\frac\s*(?:{{(?P<top>{_SIGNED})}}|(?P<top_digit>\d))"
    rf"\s*(?:{{(?P<bottom>{_SIGNED})}}|(?P<bottom_digit>\d))"
)
_POWER = r"\s*(?:\^|\*\*)\s*(?:\{\s*(?P<%s>[-+]?\d+)\s*\}|(?P<%s_plain>[-+]?\d+))"
_FORMS = [
    re.compile(form, re.ASCII)
    for form in (
        rf"(?P<units>\d+)\s*(?:and\s+)?{_SIMPLE_FRACTION}",
        r"(?P<units>\d+)\s+(?:and\s+)?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)",
        _SIMPLE_FRACTION,
        rf"(?P<factor>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*(?P<base>10)"
        + _POWER % ("exponent", "exponent"),
        rf"(?:(?P<base>{_DECIMAL})|\(\s*(?P<base_in>[-+]?{_DECIMAL})\s*\)"
        rf"|\(\s*{_SIMPLE_FRACTION}\s*\))" + _POWER % ("exponent", "exponent"),
        rf"(?P<top>{_DECIMAL})\s?/\s?(?P<bottom>[-+]?{_DECIMAL})",
        r"(?P<fixed>\d*\.\d*)\\(?:overline|bar|dot)\s*\{?(?P<repeated>\d+)\}?",
        r"(?P<decimal>\d{1,3}(?: \d{3})+(?!\d)(?:\.\d+)?)",
        rf"(?P<decimal>{_DECIMAL}(?:[eE][-+]?\d{{1,3}}(?!\d))?)",
    )
]
_MINUS = re.compile(r"(?:minus|negative)\s", re.IGNORECASE)
_PREFIX = re.compile(r"(?P<before>[-+]?)\s?(?:\\?\$|US\\?\$|[£€¥₹]|Rs\.?)?\s?(?P<after>[-+]?)\s?")
_SCALE = re.compile(rf"\s?(?P<scale>{'|'.join(SCALES)})(?![A-Za-z])", re.IGNORECASE)
_PERCENT = re.compile(r"\s?(?:\\?%|per\s?cent(?![a-z])|pct(?![a-z]))")
_DEGREES = re.compile(r"\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\degree)\s?(?:[CF](?![A-Za-z]))?")
_ORDINAL = re.compile(r"\s?\^\s?\{?\s?(?:th|st|nd|rd)\s?\}?")
_CURRENCY = re.compile(r"\s?(?:\\?\$|[£€¥₹])")
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
_ABOUT = re.compile(r"\\approx(?![a-zA-Z])")
_NAME = re.compile(r"[A-Za-z\\|][A-Za-z\\|' ]*(?:_\s?(?:\{\s?\w+\s?\}|\w))?'?\s?(?:\([^()=]*\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number as it was written.

    Example: "x = 12.50\\%" is `Number(value=Fraction(25, 2), is_percent=True, name="x",
    num_decimals=2)`.
    """

    value: Fraction
    is_percent: bool
    name: str  # of the variable that it is the value of, if that is one letter; or ""
    num_decimals: int | None  # digits behind the point; None if it is not a decimal


def read_number(answer: str) -> Number | None:
    """The number that the whole answer is; None if it is none, or one of thousands of digits."""
    if len(answer) > _MAX_LENGTH:
        return None
    name, text = _without_name(plain(answer))
    try:
        return _read(text, name)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or x/0
        return None


def same_number(first: Number, second: Number) -> bool:
    """Whether two numbers are equal, exactly. 50\\% is equal to 50 and to 0.5; x = 5 is not equal
    to y = 5.
    """
    if first.name and second.name and first.name != second.name:
        return False
    if first.value == second.value:
        return True
    if first.is_percent == second.is_percent:
        return False
    percent, other = (first, second) if first.is_percent else (second, first)
    return percent.value / 100 == other.value


def value_side(text: str) -> str:
    """The exact side of "22/7 \\approx 3.14", and the value in "x \\approx 3.14"."""
    left, *others = _ABOUT.split(text)
    if len(others) != 1:
        return text
    is_name = not left.strip() or _NAME.fullmatch(left.strip())
    return (others[0] if is_name else left).strip()


def is_number(text: str) -> bool:
    """Whether a text is a number, without a name or a unit."""
    text = plain(text)
    prefix = _PREFIX.match(text)
    assert prefix is not None
    return any(form.fullmatch(text, prefix.end()) for form in _FORMS)


def _without_name(text: str) -> tuple[str, str]:
    """Splits "x = 5" and "2 + 3 = 5" into the variable's name and the right side."""
    left, *others = _EQUALS.split(value_side(text))
    if not others:
        return "", left.strip()
    for part in (left, *others[:-1]):
        is_calculation = not re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", part))
        is_sum_of_names = not re.search(r"[\d^]", part) and re.fullmatch(r"[\w\\()+*/ -]+", part)
        if not (is_calculation or is_sum_of_names or _NAME.fullmatch(part.strip())):
            return "", text
    name = left.strip()
    return (name.lower() if len(name) == 1 and name.isalpha() else ""), others[-1].strip()


def _read(text: str, name: str) -> Number | None:
    text = _MINUS.sub("-", text, count=1) if _MINUS.match(text) else text
    prefix = _PREFIX.match(text)
    assert prefix is not None  # every part of it is optional
    if prefix["before"] and prefix["after"]:
        return None
    rest = text[prefix.end() :]
    if not rest[:1].isascii():
        return None
    sign = -1 if "-" in (prefix["before"], prefix["after"]) else 1
    found = _core_in_words(rest) if rest[:1].isalpha() else _core(rest)
    if found is None:
        return None
    value, num_decimals, rest = found
    if rest[:1].isdigit():
        return None
    if scale := _SCALE.match(rest):
        value, rest = value * SCALES[scale["scale"].lower()], rest[scale.end() :]
        num_decimals = None
    is_percent = False
    if percent := _PERCENT.match(rest):
        is_percent, rest = True, rest[percent.end() :]
    for pattern in (_DEGREES, _ORDINAL, _CURRENCY):
        if mark := pattern.match(rest):
            rest = rest[mark.end() :]
            break
    if rest.strip() and not is_unit(rest.strip(), is_attached=not rest[0].isspace()):
        return None
    return Number(value=sign * value, is_percent=is_percent, name=name, num_decimals=num_decimals)


def _core(text: str) -> tuple[Fraction, int | None, str] | None:
    """The number at the start of a text without a sign, its decimals, and the rest of the text."""
    for form in _FORMS:
        found = form.match(text)
        if found is None:
            continue
        parts = {key: value for key, value in found.groupdict().items() if value is not None}
        value = _value(parts)
        if value is None:
            return None
        decimals = None
        if "decimal" in parts and "e" not in parts["decimal"].lower():
            decimals = len(parts["decimal"].partition(".")[2])
        return value, decimals, text[found.end() :]
    return None


def _core_in_words(text: str) -> tuple[Fraction, None, str] | None:
    found = read_cardinal(text)
    return None if found is None else (Fraction(found[0]), None, found[1])


def _value(parts: dict[str, str]) -> Fraction | None:
    """The value of one of `_FORMS`, from the parts that it matched."""
    if "decimal" in parts:
        return _fraction(parts["decimal"])
    if "repeated" in parts:
        fixed, repeated = parts["fixed"], parts["repeated"]
        shift = 10 ** len(fixed.partition(".")[2])
        return _fraction(f"0{fixed}0") + Fraction(int(repeated), (10 ** len(repeated) - 1) * shift)
    fraction = None
    if "bottom" in parts or "bottom_digit" in parts:
        top = parts.get("top") or parts["top_digit"]
        bottom = parts.get("bottom") or parts["bottom_digit"]
        fraction = _fraction(top) / _fraction(bottom)
        if "units" in parts:
            is_mixed = top.strip().isdigit() and bottom.strip().isdigit() and 0 < fraction < 1
            return int(parts["units"]) + fraction if is_mixed else None
    exponent = parts.get("exponent") or parts.get("exponent_plain")
    if exponent is None:
        return fraction
    base = parts.get("base") or parts.get("base_in")
    return _power(
        fraction if base is None else _fraction(base), int(exponent), parts.get("factor", "1")
    )


def _power(base: Fraction, exponent: int, factor: str) -> Fraction | None:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > _MAX_BITS:
        return None
    return _fraction(factor) * base**exponent


def _fraction(decimal: str) -> Fraction:
    return Fraction(re.sub(r"[,\s]", "", decimal))
