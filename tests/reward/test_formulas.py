import pytest

from megatron_rl.reward.formulas import formulas_in


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("no number", []),
        ("", []),
        ("It makes 1000.", ["1000"]),
        ("first 7, so 8", ["7", "8"]),
        ("1, 2, 3", ["1", "2", "3"]),
        ("$1,234,567.50 a year", ["$1,234,567.50"]),
        ("costs $5 and then $6", ["$5", "$6"]),
        ("The total is 2 2/3 cups", ["2 2/3"]),
        ("meet at 12:30, not later", ["12:30"]),
        ("It costs 3 million dollars", ["3 million"]),
        ("3 or 4", ["3 or 4"]),
        ("3 and a half", ["3 and a half"]),
        ("3 or four", ["3 or four"]),
        ("3 and so on", ["3"]),
        ("minus 3", ["minus 3"]),
        ("50 percent of them", ["50 percent"]),
        ("3 out of 4", ["3 out of 4"]),
        ("It took 5 feet 3 inches", ["5 feet 3"]),
        ("2 hours and 30 minutes", ["2 hours and 30"]),
        ("3 apples and 4 pears", ["3 apples and 4"]),
        ("works 8 hours and earns 96", ["8", "96"]),
        ("4 plus 3 makes 7", ["4 plus 3", "7"]),
        ("so $x = 3$ and finally 5", ["x = 3", "5"]),
        ("where $n$ is 5, for every $x$", ["5"]),
        ("the derivative is 2x + 3", ["2x + 3"]),
        ("the result is x + 1", ["x + 1"]),
        (r"Therefore x = \frac{1}{ 2 }", [r"x = \frac{1}{ 2 }"]),
        ("\\[\nx = 5\n\\]", ["x = 5"]),
        ("- 5\n* 6", ["5", "6"]),
        ("the sum is - 5", ["- 5"]),
        ("**5**", ["5"]),
        ("COVID-19", ["COVID-19"]),
        ("7 (see step 3)", ["7", "3)"]),
        ("a 5 a day", ["5"]),
    ],
)
def test_a_formula_has_all_that_belongs_to_it(text, formulas):
    assert formulas_in(text) == formulas
