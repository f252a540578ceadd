"""Reads formulas with the `math-verify` library, and compares them exactly.

The library takes some texts for products of letters ("five"), `12:30` for 2/5, `2 2/3` for 4/3,
`1010_2` for 1010, and drops words and single letters behind a number. Such answers are not given to
it; they compare as numbers (`numbers.py`) or as texts.

`math_verify/grader.py` compares constants after rounding, so that 2^-60 is equal to 2^-59, also
inside of sets and equations. Its `sympy_numeric_eq` is replaced by an exact comparison.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, grader

from megatron_rl.reward.notation import plain, without_delimiters
from megatron_rl.reward.numbers import Number, value_side
from megatron_rl.reward.words import is_unit

# The library warns that the caller must limit the time; the worker pool does so.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_MAX_LENGTH = 400  # characters of a formula
_CONFIG = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    ),
)
_DIGITS = 60  # to which constants are computed
_MIN_DIGITS = 6  # significant digits that a decimal needs to stand for an irrational number

_TEXT_UNIT = re.compile(
    r"\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{([^{}]*)\}\s*(?:\^\s*(?:\{\s*-?\d\s*\}|\d))?$"
)
_WORD_UNIT = re.compile(r"(?<=[\w)}])\s+([A-Za-z]{2}.*)$")
_MISREAD = re.compile(
    r"\d\s+\.?\d|\d\s*:\s*\d|\d\s*_|0x|\.\d+\.\d|\d[eE][-+]?\d"
    r"|(?<!\\)\b[A-Za-z]{2,}\s+(?:[A-Za-z]{2}|\d)"  # "it is 5"
)
_MIXED = re.compile(r"\d\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_WORDS_ONLY = re.compile(r"[A-Za-z]+(?:[ .'][A-Za-z]+)+|[A-Za-z]{2,}")
_COMMANDS = frozenset(  # LaTeX commands, also where the backslash is missing
    (
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh",
        "tanh", "log", "ln", "exp", "max", "min", "gcd", "lcm", "det", "sqrt", "lim", "alpha",
        "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "pi", "rho", "sigma",
        "tau", "phi", "omega",
    )
)  # fmt: skip
_LETTERS = re.compile(r"(\\?)([A-Za-z]+)")
_VARIABLES = re.compile(r"[a-d]{3,4}|[x-z]{3}|[p-s]{3}|[i-n]{3}|[A-Za-z]{1,2}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s?\{\w+\}")


def read_formula(answer: str) -> Any | None:
    """The formula that the whole answer is, as a sympy object; None if it is a text."""
    if len(answer) > _MAX_LENGTH:
        return None
    text = without_delimiters(answer)
    unit = _TEXT_UNIT.search(text)
    if unit and unit.start() and is_unit(unit[1].strip(), is_attached=False):
        text = text[: unit.start()]
    text = value_side(plain(text))
    unit = _WORD_UNIT.search(text)
    if unit and is_unit(unit[1], is_attached=False):
        text = text[: unit.start()]
    latex = _latex(text)
    if latex is None:
        return None
    parsed = math_verify.parse(
        rf"\boxed{{{latex}}}", [_CONFIG], fallback_mode="no_fallback", parsing_timeout=None
    )
    return _without_floats(parsed[0]) if parsed else None


def same_formula(expected: Any, said: Any) -> bool:
    """Whether two formulas are equal: constants exactly, others as the library decides. The library
    takes `x + 1` for `y = x + 1`, and `x = 5` for 5; the order matters in pairs, not in sets.
    """
    return bool(math_verify.verify(expected, said, timeout_seconds=None))


def same_value(formula: Any, number: Number, *, is_expected: bool) -> bool:
    """Whether a formula is equal to a number. A decimal of six significant digits or more is equal
    to an irrational number that rounds to it.

    Args:
        is_expected: whether the number is the expected answer, and the formula the response's.
    """
    values = {number.value, number.value / 100} if number.is_percent else {number.value}
    for value in values:
        rational = sympy.Rational(value.numerator, value.denominator)
        pair = (rational, formula) if is_expected else (formula, rational)
        if same_formula(*pair):
            return True
    return number.num_decimals is not None and _is_rounded(formula, number)


def _latex(text: str) -> str | None:
    """A text in the LaTeX that the library reads; None if it would misread it."""
    if text.count("{") != text.count("}"):
        return None
    text = re.sub(r",?\s(?:or|and)\s", ", ", text.replace("**", "^"))
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(\\?log)\s*_\s*\{?\s*(\d+)\s*\}?\s*", r"\1_{\2} ", text)
    text = re.sub(r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    if not re.search(r"[()\[\]{}]", text):
        text = re.sub(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", _without_commas, text)
    if _MISREAD.search(text) or any(int(top) >= int(low) for top, low in _MIXED.findall(text)):
        return None
    for backslash, letters in _LETTERS.findall(_ENVIRONMENT.sub("", text)):
        if not backslash and letters not in _COMMANDS and not _VARIABLES.fullmatch(letters):
            return None
    text = _LETTERS.sub(lambda found: _as_command(found[1], found[2]), text)
    return None if _WORDS_ONLY.fullmatch(text) else text


def _without_commas(number: re.Match[str]) -> str:
    return number[0].replace(",", "")


def _as_command(backslash: str, letters: str) -> str:
    is_command = not backslash and letters in _COMMANDS
    return f"\\{letters} " if is_command else f"{backslash}{letters}"


def _without_floats(parsed: Any) -> Any:
    """The formula with its decimals as fractions, since a sum of floats is rounded."""
    floats = parsed.atoms(sympy.Float)
    if not floats:
        return parsed
    return parsed.xreplace({each: sympy.Rational(str(each)) for each in floats})


def _is_rounded(formula: Any, number: Number) -> bool:
    if not (isinstance(formula, sympy.Expr) and formula.is_number):
        return False
    exact = sympy.N(formula.doit(), _DIGITS)
    unit = sympy.Rational(1, 10**number.num_decimals)
    num_digits = len(str(abs(int(number.value / unit))))
    if formula.doit().is_rational is not False or not exact.is_real or num_digits < _MIN_DIGITS:
        return False
    return bool(abs(exact - sympy.Rational(number.value)) <= unit / 2)


_library_numeric_eq = grader.sympy_numeric_eq


def _equal_constants(first: Any, second: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Whether two constants are equal, to 50 digits relative to their size. If it is not known, the
    library goes on to simplify their difference.
    """
    matrices = (sympy.MatrixBase, sympy.MatrixExpr)
    if isinstance(first, matrices) and isinstance(second, matrices):  # element by element
        return _library_numeric_eq(first, second, float_rounding, numeric_precision)
    if not all(isinstance(each, sympy.Expr) and each.is_number for each in (first, second)):
        return False
    first, second = first.doit(), second.doit()
    if first.is_Rational and second.is_Rational:
        return bool(first == second)
    values = sympy.N(first, _DIGITS), sympy.N(second, _DIGITS)
    if not all(value.is_finite for value in values):
        return False
    size = max(abs(value) for value in values)
    return bool(abs(values[0] - values[1]) <= size / sympy.Integer(10) ** 50)


grader.sympy_numeric_eq = _equal_constants
