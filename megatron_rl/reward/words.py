"""Words beside a number: units, which leave it as it is, and words that make it another number; and
numbers written in words.

The set of units is open ("12 red apples"), so what may not stand there is listed: any word that
could change the number. A single letter may be a variable (`5t`). It is a unit only if it is known
as one and set apart, by a space or as `\\text{m}`.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_CARDINALS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_PARTS = _words(
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh "
    "sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths"
)
# Words that join two numbers to one expression.
CONNECTIVES = _words("and or to plus minus times over by of out mod modulo remainder choose")
# Words that are a number, or make another number of the one beside them.
VALUES = (
    frozenset(SCALES)
    | frozenset(_CARDINALS)
    | _PARTS
    | _words("percent pct squared cubed factorial pi sqrt point negative")
)
# Words that may make the number before them another one, or that begin a condition.
_CHANGING = (VALUES | CONNECTIVES | frozenset(f"{scale}s" for scale in SCALES)) - _words(
    "of out times"
) | _words(
    "score scores gross couple double triple twice fold nor positive into divided multiplied "
    "than not except but if when where unless for power base hex octal binary root cbrt sin "
    "cos tan cot csc log ln exp max gcd lcm tau phi theta alpha beta infinity inf"
)
# Units that need no space before them: "5cm".
_ATTACHED = _words(
    "mm cm dm km ml mL cl dl mg kg ft in yd mi lb lbs oz mph kph kmh hr hrs min mins sec secs ms "
    "am pm deg rad cents th st nd rd Hz kHz MHz GHz kW kWh MB GB KB TB USD EUR GBP cc sq degrees "
    "ha pt qt"
)
_SHORT = _words("m g s h L l N J W V A C F of in at on")
_ALGEBRA = _words("abc bcd abd xyz uvw pqr rst lmn mno ijk")
# Units of which an amount may have two: "5 feet 3 inches".
MEASURES = _words(
    "years year months month weeks week days day hours hour hrs hr h minutes minute mins min m "
    "feet foot ft yards yard miles mile meters meter metres metre km kilometers kilometres pounds "
    "pound lbs lb stone kilograms kilogram kg gallons gallon quarts quart dollars dollar pesos "
    "euros euro degrees degree"
)
_MAX_UNIT_WORDS = 8

_WORD = re.compile(r"[\s-]*([A-Za-z]+)")
_UNIT = re.compile(r"(?P<word>[A-Za-z]+)\.?(?:\s?\^\s?(?:\{\s?-?\d\s?\}|-?\d)|(?<=m)[23](?!\d))?")
_JOINT = re.compile(r"\s?(?:/|\\cdot|\*|-)\s?|\s")


def is_unit(text: str, *, is_attached: bool) -> bool:
    """Whether a text behind a number leaves the number as it is: a unit, or what was counted.

    Args:
        text: without white space around it, in the notation of `notation.plain`.
        is_attached: whether nothing separates it from the number.
    """
    place = 0
    for _ in range(_MAX_UNIT_WORDS):
        found = _UNIT.match(text, place)
        if found is None or not _is_unit_word(found["word"], is_attached=is_attached):
            return False
        if found.end() == len(text):
            return True
        joint = _JOINT.match(text, found.end())
        if joint is None:
            return False
        place, is_attached = joint.end(), False
    return False


def _is_unit_word(word: str, *, is_attached: bool) -> bool:
    if word in _ATTACHED:
        return True
    if is_attached:
        return False
    if len(word) < 3:
        return word in _SHORT
    return word.lower() not in _CHANGING and word.lower() not in _ALGEBRA


def read_cardinal(text: str) -> tuple[int, str] | None:
    """The number that a text begins with in words, and the rest of the text; None if there is none.

    Reads "five", "Twenty-one apples", "one hundred and five", "two million"; not "one two".
    """
    total = part = 0
    last = 0  # the value of the last word: a smaller one follows, or a scale
    end = place = 0
    is_read = False
    while (found := _WORD.match(text, place)) is not None:
        word, place = found[1].lower(), found.end()
        if word == "and" and last >= 100:
            continue  # belongs to the number only if a word of the number follows
        if word in _CARDINALS:
            value = _CARDINALS[word]
            is_unit_of_tens = last in range(20, 100, 10) and 0 < value < 10
            if is_read and last < 100 and not is_unit_of_tens:
                return None
            part += value
        elif word == "hundred" and part:
            value, part = 100, part * 100
        elif word in SCALES and word != "dozen" and part:
            value = SCALES[word]
            if total and total < value * part:
                return None
            total, part = total + part * value, 0
        else:
            break
        last, end, is_read = value, place, True
    return (total + part, text[end:]) if is_read else None
