"""A calculator: `<calc>12*(3+4)</calc>` is answered with `<result>84</result>`. A turn without a
call ends the episode.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from megatron_rl.records import Prompt

CALL = re.compile(r"<calc>([^<]{1,200})(?:</calc>|$)")
MAX_BITS = 4096  # of a number on the way; a longer one is an error
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, other: Fraction(one // other),
    ast.Mod: operator.mod,
}


def reply(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """The result of the last call in the last turn, or what is wrong with it."""
    calls = CALL.findall(turns[-1])
    if not calls:
        return None
    try:
        return f"<result>{written(value_of(calls[-1]))}</result>"
    except (ArithmeticError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return f"<result>error: {error}</result>"


def value_of(text: str) -> Fraction:
    """The exact value of numbers, parentheses and + - * / // %.

    Raises:
        ValueError, SyntaxError, ArithmeticError: it is something else, or too large.
    """
    return _value(ast.parse(text.strip(), mode="eval").body)


def written(value: Fraction) -> str:
    """A whole number exactly, another one to ten digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("only numbers, parentheses and + - * / // % are known")
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the number is too large")
    return value
