from fractions import Fraction

import pytest

from megatron_rl.reward.numbers import is_number, read_number, same_number

F = Fraction


def value(text):
    number = read_number(text)
    return None if number is None else number.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42),
        ("-3", -3),
        ("- 3", -3),
        ("\u22127", -7),
        ("+7", 7),
        ("7.", 7),
        ("007", 7),
        (".5", F(1, 2)),
        ("\uff13", 3),
        ("2e3", 2000),
        ("1.5e-3", F(3, 2000)),
        (r"3 \times 10^4", 30000),
        ("3 x 10^{-2}", F(3, 100)),
        (r"0.\overline{3}", F(1, 3)),
        (r"0.1\overline{6}", F(1, 6)),
        (r"1.\overline{09}", F(12, 11)),
    ],
)
def test_decimals(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize("text", ["1,000", "1{,}000", r"1\,000", "1 000", "1\u202f000", r"1,\!000"])
def test_thousands(text):
    assert value(text) == 1000
    assert value("1,00,000") == 100_000
    assert value("12,345,678.5") == F(24691357, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3/4", F(3, 4)),
        ("-3 / 4.", F(-3, 4)),
        ("3/-4", F(-3, 4)),
        (r"\frac{3}{4}", F(3, 4)),
        (r"\frac12", F(1, 2)),
        (r"\frac1{20}", F(1, 20)),
        (r"-\dfrac{ 1 }{ 3 }", F(-1, 3)),
        ("½", F(1, 2)),
        ("2½", F(5, 2)),
        (r"2\frac{2}{3}", F(8, 3)),
        ("2 2/3", F(8, 3)),
        ("-2 2/3", F(-8, 3)),
        ("2 and 2/3", F(8, 3)),
    ],
)
def test_fractions(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10^5", 10**5),
        ("10^{5}", 10**5),
        ("10⁵", 10**5),
        ("10**5", 10**5),
        ("10^10", 10**10),
        ("2^{-60}", F(1, 2**60)),
        ("-2^2", -4),
        ("(-2)^2", 4),
        (r"\left(\frac{1}{2}\right)^3", F(1, 8)),
    ],
)
def test_powers(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("five", 5),
        ("minus five", -5),
        ("Twenty-one apples", 21),
        ("one hundred and five", 105),
        ("two million three hundred thousand", 2_300_000),
        ("3 million", 3_000_000),
        (r"3\text{ million}", 3_000_000),
        ("$2.5 billion", 2_500_000_000),
        ("12 dozen", 144),
    ],
)
def test_words(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        r"5\text{ cm}^2", "5 cm^2", "5cm", "5 m", r"5\text{m}", "5 m/s^2", r"5\ \mathrm{m\,s^{-1}}",
        "5 miles per hour", "5 red apples", "5 of the pie", "$5", r"\$5", "$5$", "5€", "5°",
        "5^\\circ",
        r"5^{\circ}\text{C}", r"5\%", "5 percent", "5th", r"5^{\text{th}}", "x = 5", "x=5 cm",
        "f(2) = 5", "2 + 3 = 5", "a + b = 5", r"\angle ABC = 5", r"x \approx 5", r"5 \approx 5.1",
        r"\(5\)", "**5**", "`5`", r"\mathbf{5}", r"\text{5 apples}", "5 times",
    ],
)  # fmt: skip
def test_what_may_stand_beside_a_number(text):
    assert value(text) == 5


@pytest.mark.parametrize(
    "text",
    [
        # a time, a ratio, a pair, a range, a version, a decimal comma
        "12:30", "3:4", "(3,4)", "3,4", "5-7", "5\u20137", "1.2.3", "1.234,56", "1.000.000",
        "12 34",        # a calculation is not a number: a repeated question would be right
        "2+3", "5!", "1/2/3", "10 - 3", r"\sqrt{4}", "2(3)", "2^3^2", r"2 \cdot 3",
        # bases, formulas, variables
        "5_{10}", "1010_2", "1010\u2082", "0x1F", "5t", "5m", "2 abc", "2 a", r"2\pi", "x^2=4",
        "2x=6",        r"\frac{a}{7}", r"\frac{1}{2}x", r"\frac123", "2 3/2", "5e",
        # words that make another number
        "7 (see step 3)", "3 or 4", "3 and a half", "two thirds", "three quarters", "one two",
        "5 R 2", "5 remainder 2", "5 less than 7", "3 squared", "2 sqrt(3)", "5k", "3M",
        "5 or more",
        "5 feet 3 inches", "5'3", "3 of 4", "5 if x > 0", "three point five", "50% of 20",
        # nothing, or not finite
        "", "A", "no number", "1/0", "9" * 5000, "2^{99999999}", "1e99999", "\u0663",
    ],
)  # fmt: skip
def test_no_part_of_it_is_read(text):
    assert read_number(text) is None


def test_numbers_are_equal_exactly():
    def same(first, second):
        return same_number(read_number(first), read_number(second))

    assert same("0.5", "1/2")
    assert same(r"50\%", "50") and same(r"50\%", "0.5") and same("0.5", "50 percent")
    assert not same(r"50\%", "5")
    assert not same("0.333333", "1/3")
    assert not same("1.0000004", "1.0000001")
    assert not same("2^{-99}", "2^{-98}")
    assert same("x = 5", "5") and same("x = 5", "X = 5") and not same("x = 5", "y = 5")


@pytest.mark.parametrize("text", ["7", " -7 ", "7.", "1,000", "3/4", r"\frac{1}{2}"])
def test_is_number(text):
    assert is_number(text)


@pytest.mark.parametrize("text", ["", "7+", "12 34", "seven", "x=7", "7 cm"])
def test_is_not_a_number(text):
    assert not is_number(text)
