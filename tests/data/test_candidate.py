from decimal import Decimal

import pytest

from megatron_rl.data.candidate import Candidate, Layout, check_template, read_candidate
from megatron_rl.errors import ConfigError, DataError

PLAIN = Layout(prompt_column="question", answer_column="answer")


def read(record, **layout):
    settings = {"prompt_column": "question", "answer_column": "answer", **layout}
    return read_candidate(record, Layout(**settings), "file, line 1", {})


def test_plain():
    assert read({"question": "4+3=", "answer": 7}) == Candidate(
        messages=(("user", "4+3="),), answer="7", metadata={}
    )


def test_template_keeps_its_own_braces():
    candidate = read({"question": "4+3", "answer": "7"}, template=r"{prompt}= \boxed{}")
    assert candidate.messages == (("user", r"4+3= \boxed{}"),)


def test_dapo_layout_with_system_message():
    record = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 4+3?"},
        ],
        "reward_model": {"ground_truth": "7", "style": "rule"},
    }
    candidate = read(
        record,
        prompt_column="prompt",
        answer_column="reward_model.ground_truth",
        template="Q: {prompt}",
    )
    assert candidate.messages == (("system", "Be brief."), ("user", "Q: What is 4+3?"))
    assert candidate.answer == "7"


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("He has 4+3=<<4+3=7>>7 apples.\n#### 7", "7"),
        ("...\n#### 1,234", "1234"),
        ("...\n#### -12,345.5 ", "-12345.5"),
        ("...\n#### (1,2)", "(1,2)"),
        ("no mark 1,234", "no mark 1,234"),
    ],
)
def test_gsm8k_answers(answer, final):
    assert read({"question": "q", "answer": answer}).answer == final
    assert read({"question": "q", "answer": answer}, is_final_answer=False).answer == answer


def test_dotted_paths():
    record = {"a": {"b": {"c": "deep"}}, "a.x": "whole name", "turns": [{"t": "zero"}, "one"]}
    for path, text in [
        ("a.b.c", "deep"),
        ("a.x", "whole name"),
        ("turns.0.t", "zero"),
        ("turns.1", "one"),
    ]:
        assert read(record, prompt_column=path, answer_column=path).messages == (("user", text),)


@pytest.mark.parametrize("path", ["question.x", "turns.2", "turns.x", "metadata.expresion", ""])
def test_a_missing_column_names_the_nearest(path):
    record = {"question": "q", "metadata": {"expression": "1"}, "turns": ["a", "b"], "answer": ""}
    with pytest.raises(DataError, match=r"file, line 1: expected a col.*prompt_column.*nearest"):
        read(record, prompt_column=path)


def test_the_nearest_column_is_a_dotted_one():
    record = {"question": "q", "metadata": {"expression": "1"}}
    with pytest.raises(DataError, match=r"answer_column.*nearest: metadata\.expression\)"):
        read(record, answer_column="metadata.expresion")


@pytest.mark.parametrize("value", [None, 7, [], ["a"], [{"role": "user"}], {"content": "x"}])
def test_a_prompt_that_is_no_text(value):
    with pytest.raises(DataError, match=r"a text or a list of chat messages in column 'question'"):
        read({"question": value, "answer": "1"})


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, True])
def test_an_answer_that_is_no_text(value):
    with pytest.raises(DataError, match=r"a text or a finite number in column 'answer'"):
        read({"question": "q", "answer": value})


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (7, "7"),
        (7.0, "7"),
        (-0.0, "0"),
        (1e22, "1e+22"),
        (-0.5, "-0.5"),
        (10**30, "1" + "0" * 30),
        (10**400, "1" + "0" * 400),  # beyond any float
        (Decimal("1.50"), "1.50"),
        (" 7 ", " 7 "),
    ],
)
def test_numbers_are_answers(value, answer):
    assert read({"question": "q", "answer": value}, is_answer_required=True).answer == answer


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), Decimal("NaN"), Decimal("-Infinity")]
)
def test_numbers_that_are_none(value):
    with pytest.raises(DataError, match=r"file, line 1: expected a text or a finite number"):
        read({"question": "q", "answer": value})


def test_a_system_prompt_takes_the_place_of_the_records_own():
    turns = [
        {"role": "system", "content": "theirs"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "4+3"},
    ]
    record = {"question": turns, "answer": "7"}
    kept = read(record, template="{prompt}=").messages
    assert kept == (("system", "theirs"), ("user", "1+1"), ("assistant", "2"), ("user", "4+3="))
    mine = read(record, template="{prompt}=", system_prompt="mine").messages
    assert mine == (("system", "mine"), *kept[1:])
    plain = read({"question": "4+3", "answer": "7"}, system_prompt="mine").messages
    assert plain == (("system", "mine"), ("user", "4+3"))


def test_only_the_question_must_not_be_empty():
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "4+3"}]
    assert read({"question": chat, "answer": "7"}).messages[0] == ("system", "")
    chat[1]["content"] = " "
    with pytest.raises(DataError, match="expected a question in column 'question'"):
        read({"question": chat, "answer": "7"})


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        r"{prompt} Answer in \boxed{}.",
        r"{prompt} Answer as \boxed{answer} or \frac{1}{answer}.",
        '{prompt} Answer as {"a": 1}.',
        "{prompt} {other} { level }",
    ],
)
def test_braces_of_a_template_are_text(template):
    check_template(RECORD, Layout(prompt_column="q", answer_column="answer", template=template))


@pytest.mark.parametrize("field", ["{level}", "{answer}", "{metadata.level}"])
def test_a_column_in_a_template_is_refused(field):
    layout = Layout(
        prompt_column="q",
        answer_column="answer",
        template=f"{{prompt}} {field}=",
        prompt_key="data.tasks[0].prompt_column",
    )
    with pytest.raises(ConfigError) as caught:
        check_template(RECORD, layout)
    assert str(caught.value) == (
        f"data.tasks[0].template: expected {{prompt}} and no other column, got {field}, which "
        f"would stay as text; put it into the prompt column, or write {{ {field[1:-1]} }} for "
        "braces"
    )


RECORD = {"q": "1+1", "answer": "2", "level": 3, "metadata": {"level": 3}}
