from fractions import Fraction

import pytest

from megatron_rl.reward.answers import (
    expected_answer,
    final_answer,
    find_answer,
    last_number,
    without_unfinished_reasoning,
)


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("7", "7"),
        ("  7\n", "7"),
        ("", ""),
        ("first <answer>3</answer> then <answer> 4 </answer> done", "4"),
        ("<think>2 <answer>9</answer></think> 5", "5"),
        ("<Answer>3</Answer> or <ANSWER>4</ANSWER>", "4"),
        ("<answer >4</answer\n>", "4"),
        ("<answer>3</answer> 4", "3"),
        (r"<answer></answer> \boxed{4}", ""),
        ("<THINK>2 <answer>9</answer></THINK> 5", "5"),
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<answer>8</answer> \boxed{1}", "8"),
        (r"<answer>so \boxed{8}</answer>", "8"),
        (r"\fbox{3}", "3"),
        (r"\boxed {3}", "3"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        # a stop string "</answer>" is not part of the response
        ("<answer>12", "12"),
        (r"cut off \boxed{12", ""),
        (r"\boxed{}", ""),
        (r"\boxed{3} is wrong, so \boxed{1", ""),
        ("5 - 2 = 3\n#### 3", "3"),
        ("#### Step 1\nWe add.\nyes", "#### Step 1\nWe add.\nyes"),
        ("The answer is 7.", "7"),
        ("The answer is 7. It is prime.", "7"),
        ("**Answer:** 7", "7"),
        ("**Final answer**: **yes**", "yes"),
        ("Answer: $7$", "7"),
        ("The answer to part 2 is:\n\n7", "7"),
        ("The answers are 3 and 4", "3 and 4"),
        ("The answer is not 5 but 6", "The answer is not 5 but 6"),
        ("It isn't an answer", "It isn't an answer"),
    ],
)
def test_the_text_of_the_answer(response, text):
    assert final_answer(response) == text


@pytest.mark.parametrize(
    ("response", "readings"),
    [
        (r"\boxed{7 (see step 3)}", ("7 (see step 3)",)),
        ("<answer>The answer is 7</answer>", ("The answer is 7",)),
        ("The answer is 42 because 6*7=42", ("42", "42 because 6*7=42")),
        ("2 and 3. The answer is clear. It is 7.", ("clear", "7")),
        ("2 and then 3", ("3", "2 and then 3")),
        ("yes", ("yes",)),
    ],
)
def test_where_a_number_or_formula_is_looked_for(response, readings):
    assert find_answer(response).readings == readings


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("1{,}000", 1000),
        (r"1\,000", 1000),
        ("1 000", 1000),
        (r"\frac12", Fraction(1, 2)),
        (r"2\frac{2}{3}", Fraction(8, 3)),
        ("2 2/3", Fraction(8, 3)),
        ("10^5", 100000),
        (r"3 \times 10^4", 30000),
        (r"5\text{ cm}^2", 5),
        ("7 (see step 3)", None),
        (r"50\%", 50),
        (r"\sqrt{2}", None),
        (r"2\pi", None),
        ("5!", None),
        ("2+3", None),
        ("1/2/3", None),
        ("5_{10}", None),
        ("12:30", None),
        ("(3,4)", None),
        ("1,00,000", 100000),
        ("0x1F", None),
        (r"\frac{a}{7}", None),
        ("-3", -3),
        ("1,000", 1000),
        ("first 7, so 8", 8),
        ("five", 5),
    ],
)
def test_the_last_number_of_an_answer(said, value):
    assert last_number(final_answer(rf"\boxed{{{said}}}")) == value


def test_nothing_is_looked_for_among_the_words_of_an_expected_answer():
    assert expected_answer("12 apples, 3 each") == "12 apples, 3 each"
    assert expected_answer(r"so \boxed{7}") == "7"


@pytest.mark.parametrize(
    ("prompt", "response", "rest"),
    [
        ("q", "7", "7"),
        ("q", r"<think>perhaps \boxed{7}", ""),
        ("q", r"I say 3. <think>or \boxed{7}", "I say 3. "),
        ("q", r"<think>a</think> \boxed{3} <think>or \boxed{7}", r"<think>a</think> \boxed{3} "),
        ("q", "<think>a <think> b</think> 7", "<think>a <think> b</think> 7"),
        ("q<think>\n", r"perhaps \boxed{7}", ""),
        ("q<think>\n", "perhaps</think> 7", "perhaps</think> 7"),
        ("q<think>\n", "a</think> 7 <think>b", "a</think> 7 "),
        ("q", "<Think>perhaps 7", ""),
        ("q<THINK>", "perhaps 7", ""),
        ("q<think>", "perhaps</Think> 7", "perhaps</Think> 7"),
        ("", "7", "7"),
        # thinking is switched off in the prompt, or only spoken of
        ("q<think>\n\n</think>\n\n", "7", "7"),
        ("Think inside <think> tags. q", "7", "7"),
    ],
)
def test_without_unfinished_reasoning(prompt, response, rest):
    assert without_unfinished_reasoning(response, prompt) == rest


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 300_000,
        "<answer" + " " * 10**6,
        "</think>" * 300_000,
        r"\boxed{" * 300_000,
        "answer is " * 200_000,
        "$1" * 500_000,
        " " * 10**6,
    ],
)
def test_a_response_of_megabytes_takes_no_time(text):
    assert isinstance(final_answer(text), str)  # a quadratic search would take hours
