import pytest

from megatron_rl.reward.numbers import read_number
from megatron_rl.reward.symbolic import read_formula, same_formula, same_value


def same(expected, said):
    return same_formula(read_formula(expected), read_formula(said))


@pytest.mark.parametrize(
    "text",
    [
        # the library reads a product of letters, or a part of the number
        "five", "evil", "ABC", "xy", "no solution", r"\text{even}", "it is 5", "7 (see step 3)",
        "all real numbers", r"\angle ABC", "12:30", "3:4", "2 2/3x", r"2\frac{3}{2}", "12 34",
        "1010_2", "5_{10}", "0x1F", "1.2.3", "2e3x", r"x\text{ million}", "{", "x" * 500,
    ],
)  # fmt: skip
def test_a_text_is_not_given_to_the_library(text):
    assert read_formula(text) is None


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ("x+1", "1 + x"),
        ("p - q", "-q + p"),
        ("x^2-1", "(x-1)(x+1)"),
        ("2xy", "2yx"),
        ("2abc", "2cba"),
        (r"2\sqrt{3}", "2 sqrt(3)"),
        (r"2\pi", "2 pi"),
        (r"6\pi", r"6\pi \text{ cm}^2"),
        (r"6\pi", "6 \\pi square inches"),
        (r"\frac{1}{2}x", "0.5x"),
        (r"\sin(x)", "sin(x)"),
        ("y=2x+1", "2x+1"),
        (r"\{1, 2\}", "2 and 1"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ],
)
def test_equal_formulas(expected, said):
    assert same(expected, said)


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        # the library's absolute rounding takes these for equal
        (r"\frac{\sqrt{2}}{2^{99}}", r"\frac{\sqrt{2}}{2^{98}}"),
        (r"\{2^{-60}, 1\}", r"\{2^{-59}, 1\}"),
        ("x + 2^{-60}", "x + 2^{-59}"),
        (r"\left(\frac13, 1\right)", "(0.333333, 1)"),
        (r"\begin{pmatrix}2^{-60}\\1\end{pmatrix}", r"\begin{pmatrix}2^{-59}\\1\end{pmatrix}"),
        ("(1, 2)", "(2, 1)"),
        ("2x", "2y"),
        ("x > 3", r"x \ge 3"),
    ],
)
def test_different_formulas(expected, said):
    assert not same(expected, said)


@pytest.mark.parametrize(
    ("formula", "number", "is_same"),
    [
        ("5!", "120", True),
        ("2+3", "5", True),
        (r"\sqrt{16}", "4", True),
        (r"\log_2 8", "3", True),
        (r"\frac{1}{2} \cdot \frac{1}{2}", "25%", True),
        (r"\{5\}", "5", True),
        (r"\sqrt{2}", "1.41421", True),  # six digits, rounded
        (r"\sqrt{2}", "1.41422", False),
        (r"\sqrt{2}", "1.4142", False),
        (r"\sqrt{2}", "99/70", False),
        (r"\frac{1}{3} + 0", "0.3333333", False),
        (r"\frac{\pi}{10^{9}}", "0.000000003", False),
        ("5x", "5", False),
        (r"\infty", "5", False),
    ],
)
def test_a_formula_and_a_number(formula, number, is_same):
    formula, number = read_formula(formula), read_number(number)
    assert same_value(formula, number, is_expected=True) == is_same
    assert same_value(formula, number, is_expected=False) == is_same
