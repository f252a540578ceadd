from fractions import Fraction

import pytest

from megatron_rl.reward.answers import final_answer, is_number, last_number


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7", "7"),
        ("  7\n", "7"),
        ("", ""),
        ("first <answer>3</answer> then <answer> 4 </answer> done", "4"),
        ("<think>2 <answer>9</answer></think> 5", "5"),
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<answer>8</answer> \boxed{1}", "8"),
        (r"cut off \boxed{12", r"cut off \boxed{12"),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("$1,234,567.50 a year", Fraction("1234567.5")),
        ("1, 2, 3", 3),
        ("-3", -3),
        ("x = -3.5", Fraction(-7, 2)),
        ("5-3", 3),
        ("\u22127", -7),
        ("+7", 7),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4.", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 1 }{ 3 }", Fraction(-1, 3)),
        (".5", Fraction(1, 2)),
        ("2e3", 2000),
        ("50%", 50),
        ("#### 1,000", 1000),
        ("no number", None),
        ("", None),
        ("1/0", None),
        ("9" * 5000, None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_last_number_is_not_slow_on_exponents():
    assert last_number("1e999999999") != 0  # read as its digits, not as a power


@pytest.mark.parametrize("text", ["7", " -7 ", "7.", "1,000", "3/4", r"\frac{1}{2}"])
def test_is_number(text):
    assert is_number(text)


@pytest.mark.parametrize("text", ["", "7+", "12 34", "seven", "x=7"])
def test_is_not_a_number(text):
    assert not is_number(text)
