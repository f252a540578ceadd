"""The built-in verifiers of one response."""

import json
from itertools import product

import pytest
import reasoning_gym

from megatron_rl.records import Score
from megatron_rl.reward.verifiers import exact, math_verify, numeric
from megatron_rl.reward.verifiers import reasoning_gym as gym_verifier


def judged(score: Score):
    assert score.failure is None
    return score.reward, score.is_formatted


def rewards(response, answer):
    return [each.verify(response, answer, {}).reward for each in (math_verify, numeric, exact)]


def test_exact():
    assert judged(exact.verify(" 7 ", "7", {})) == (1.0, True)
    assert judged(exact.verify("<answer>7</answer>", "7", {})) == (1.0, True)
    assert judged(exact.verify("The answer is yes.", "The answer is yes.", {})) == (1.0, True)
    assert judged(exact.verify("7.0", "7", {})) == (0.0, True)
    assert judged(exact.verify(" ", "7", {})) == (0.0, False)
    with pytest.raises(ValueError, match="expected an answer, got ' '"):
        exact.verify("", " ", {})


def test_numeric():
    assert judged(numeric.verify("It makes 1000.", "1,000", {})) == (1.0, True)
    assert judged(numeric.verify("first 7, so 8", "7", {})) == (0.0, True)
    assert judged(numeric.verify("0.5", "1/2", {})) == (1.0, True)
    assert judged(numeric.verify("seven", "7", {})) == (1.0, True)
    assert judged(numeric.verify(r"\boxed{12:30}", "12", {})) == (0.0, False)
    assert judged(numeric.verify("I do not know", "7", {})) == (0.0, False)
    with pytest.raises(ValueError, match="expected a number, got 'x'"):
        numeric.verify("7", "x", {})


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{100000}", "10^5", 1),
        (r"\boxed{5}", "10^5", 0),
        (r"\boxed{2/3}", "2 2/3", 0),
        (r"\boxed{0}", "1{,}000", 0),
        ("12", "12 cm", 1),
        ("3", "3 million", None),
        ("30", "12:30", None),
        ("4", "3 or 4", None),
        (r"\boxed{6\times 10^{23}}", "23", 0),
        (r"\boxed{5\pm 2}", "2", 0),
        (r"\boxed{1.000}", "1000", 0),
        (r"\boxed{2023-05-01}", "2023", 0),
        (r"\boxed{7^{\circ}30'}", "7", 0),
        (r"\boxed{|-7|}", "-7", 0),
    ],
)
def test_numeric_reads_the_whole_expected_answer(response, answer, right):
    if answer in ("12:30", "3 or 4"):
        with pytest.raises(ValueError, match="expected a number"):
            numeric.verify(response, answer, {})
    else:
        assert numeric.verify(response, answer, {}).reward == (right or 0)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so \boxed{0.5}", "1/2", (1.0, True)),
        ("Answer: 34", "34", (1.0, True)),
        ("Answer: $34$", "34", (1.0, True)),
        ("x=34, and so Answer: 35", "34", (0.0, True)),
        (r"\boxed{1+x}", "x+1", (1.0, True)),
        (r"<think>\boxed{3}</think>\boxed{4}", "4", (1.0, True)),
        ("So the derivative is $2x$.", "2x", (1.0, True)),
        ("I do not know", "34", (0.0, False)),
        (r"\boxed{I do not know}", "34", (0.0, False)),
        (r"\boxed{7 (see step 3)}", "7", (0.0, False)),
        (r"\boxed{no}", "no solution", (0.0, True)),
        (r"\boxed{}", "34", (0.0, False)),
    ],
)
def test_math_verify(response, answer, expected):
    assert judged(math_verify.verify(response, answer, {})) == expected


def test_math_verify_needs_an_expected_answer():
    with pytest.raises(ValueError, match="expected an answer, got ' '"):
        math_verify.verify("7", " ", {})


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is 2 2/3", "2", 0),
        ("The answer is 1 1/2", "1", 0),
        (r"\boxed{2 2/3}", "4/3", 0),
        (r"\boxed{2 2/3}", "8/3", 1),
        ("The answer is 2 2/3", "8/3", 1),
        (r"\boxed{8/3}", "2 2/3", 1),
        (r"\boxed{2\frac{2}{3}}", "8/3", 1),
        (r"\boxed{\frac{1}{2^{99}}}", r"\frac{1}{2^{98}}", 0),
        (r"\boxed{2^{-60}}", "2^{-59}", 0),
        (r"\boxed{0.0000001}", "0.0000002", 0),
        (r"\boxed{1.0000004}", "1.0000001", 0),
        (r"\boxed{evil}", "live", 0),
        (r"\boxed{pots}", "stop", 0),
        (r"\boxed{BCA}", "ABC", 0),
        (r"\boxed{five}", "five", 1),
        (r"\boxed{5}", "five", 1),
        ("The answer is 12:30", "12", 0),
        ("The answer is 3 million", "3", 0),
        ("The answer is 7!", "7", 0),
        ("The answer is 2 sqrt(3)", "2", 0),
        # of the same kinds
        (r"\boxed{3\text{ million}}", "3", 0),
        ("The answer is 3 million", "3,000,000", 1),
        ("The answer is 3 or 4", "3", 0),
        ("The answer is 5 feet 3 inches", "5", 0),
        ("It is 3 and a half", "3", 0),
        ("So 1,5 it is", "1.5", 0),
        (r"\boxed{5t}", "5", 0),
        (r"\boxed{5t}", "5t", 1),
        (r"\boxed{1010_2}", "1010", 0),
        (r"\boxed{12:30}", "2/5", 0),
        (r"\boxed{12:30}", "12:30", 1),
        (r"\boxed{0.333333}", "1/3", 0),
        (r"\boxed{\angle BCA}", r"\angle ABC", 0),
        (r"\boxed{no solution}", r"\text{No solution}", 1),
        (r"\boxed{solution no}", "no solution", 0),
        (r"\boxed{y = 5}", "x = 5", 0),
        (r"\boxed{\text{(B)}}", "B", 1),
        (r"\boxed{god}", "dog", 0),
        (r"\boxed{\overline{AB}}", r"\overline{BA}", 0),
        (r"\boxed{\frac{10^{20}+1}{10^{20}}}", "1", 0),
        (r"\boxed{3+4i}", "4+3i", 0),
        (r"\boxed{[1,2)}", "(1,2)", 0),
        (r"\boxed{x<2}", "x>2", 0),
        (r"\boxed{\infty}", r"-\infty", 0),
    ],
)
def test_math_verify_takes_no_other_answer_for_the_right_one(response, answer, right):
    assert math_verify.verify(response, answer, {}).reward == right


@pytest.mark.parametrize(
    ("content", "answer"),
    [("7", "7"), (" 7 ", "7"), ("-7/2", "-7/2"), ("1,000", "1000"), ("x+1", "x+1"), ("no", "no")],
)
def test_one_rule_of_what_the_answer_is(content, answer):
    for response in (
        f"<think>so 1</think><answer>{content}</answer>",
        f"<answer>{content}</answer>",
        f"<answer>{content}",
        rf"<answer>\boxed{{{content}}}</answer>",
        rf"is 3, so \boxed{{{content}}} and 4",
        f"It is so.\n#### {content}",
        f"The answer is {content}.",
    ):
        for verifier in (math_verify, numeric, exact):
            if verifier is numeric and answer in ("x+1", "no"):
                continue
            if verifier is exact and content.strip() != answer:
                continue
            assert judged(verifier.verify(response, answer, {})) == (1.0, True)


WRITINGS = {
    "1000": ("1000", "1,000", "1{,}000", r"1\,000", "1000.0", "10^3", "1 000", "1e3",
        r"1 \times 10^3"),
    "-7/2": ("-3.5", r"-\frac{7}{2}", r"-\dfrac72", "-3 1/2", r"-3\frac{1}{2}", "\u22123.5", "-3½"),
    "0.25": ("1/4", ".25", r"\frac14", "2^{-2}", "25/100", "25%", r"25\%", "¼", "25 percent"),
    "42": ("42.0", "84/2", "42 apples", "$42", r"\$42", r"42^\circ", "42 cm^2", "042", "x = 42"),
}  # fmt: skip
AROUND = (
    "{}", "{}.", "The answer is {}.", "Answer: {}", "**Answer:** {}", "**Final Answer**: **{}**",
    "3+4=9.\nThe final answer is {}", "<answer>{}</answer>", "<answer> {} </answer>\n",
    "<think>maybe 4</think><answer>{}</answer>", r"so \boxed{{{}}}.", r"$\boxed{{{}}}$",
    r"\[\boxed{{{}}}\]", r"<think>\boxed{{1}}</think>Thus $$\boxed{{{}}}$$",
    "We get 13 - 4.\n#### {}", "So we have \\({}\\).", "Therefore it is {}", r"\fbox{{{}}}",
    r"\boxed{{{} }}", "The answer is: {}", "The answer is\n\n{}", "So it is {}.",
    r"<answer>\boxed{{{}}}</answer>", "Hence the answer to the question is {}", r"\boxed {{{}}}",
    "Step 1: 3, step 2: 4.\n\n**Answer: {}**", "The answer is {}, since 3 < 4", "\n\n{}\n",
    "Answer = {}", "the answer must be {}", "We find 12, then {}",
)  # fmt: skip


def test_a_thousand_right_answers_are_right():
    wrong, num_judged = [], 0
    for answer, writings in WRITINGS.items():
        for writing, around in product(writings, AROUND):
            response = around.format(writing)
            for expected, verifier in product((answer, writing), (numeric, math_verify)):
                num_judged += 1
                if verifier.verify(response, expected, {}) != Score(
                    reward=1.0, is_formatted=True, failure=None
                ):
                    wrong.append((verifier.__name__, response, expected))
    assert num_judged > 1000
    assert wrong == []


def metadata_of(task, entry, **options):
    return json.loads(json.dumps({"task": task, "options": options, "entry": entry}))


def test_reasoning_gym_uses_the_task_and_its_entry():
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=5)[2]
    metadata = metadata_of("chain_sum", entry)
    answer = entry["answer"]
    assert judged(gym_verifier.verify(answer, answer, metadata)) == (1.0, True)
    assert judged(gym_verifier.verify(f"<answer>{answer}.0</answer>", answer, metadata)) == (
        1.0,
        True,
    )
    assert judged(gym_verifier.verify("nothing", answer, metadata)) == (0.0, False)
    with pytest.raises(ValueError, match="none of task, options, entry"):
        gym_verifier.verify("1", "1", {})


@pytest.mark.parametrize("task", ["countdown", "rearc", "arc_agi", "maze", "simple_equations"])
def test_reasoning_gym_scores_survive_json(task):
    dataset = reasoning_gym.create_dataset(task, seed=5, size=3)
    for entry in (dataset[0], dataset[1]):
        score = gym_verifier.verify(entry["answer"], entry["answer"], metadata_of(task, entry))
        assert judged(score) == (dataset.score_answer(entry["answer"], entry), True)
        assert score.reward == 1.0
