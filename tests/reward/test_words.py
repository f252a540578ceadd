import pytest

from megatron_rl.reward.words import is_unit, read_cardinal


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("five", (5, "")),
        ("Twenty-one apples", (21, " apples")),
        ("one hundred and five", (105, "")),
        ("one hundred and more", (100, " and more")),
        ("nine hundred ninety-nine thousand", (999_000, "")),
        ("two million three hundred thousand and one", (2_300_001, "")),
        ("zero", (0, "")),
        ("two thirds", (2, " thirds")),
        ("one two", None),
        ("twenty eleven", None),
        ("hundred", None),
        ("someone", None),
        ("", None),
    ],
)
def test_read_cardinal(text, found):
    assert read_cardinal(text) == found


def test_units():
    for text in ("cm", "apples", "square feet", "km/h", "m s^{-1}", "of the pie"):
        assert is_unit(text, is_attached=False)
    for text in ("x", "million", "or more", "thirds", "abc", "apples, pears", "apples 3", ""):
        assert not is_unit(text, is_attached=False)
    assert is_unit("kg", is_attached=True)
    assert not is_unit("m", is_attached=True) and not is_unit("apples", is_attached=True)
