"""Sets of questions from files and tasks: which questions, their indices, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config, DataConfig, EvalConfig, EvalSetConfig, SamplingConfig
from megatron_rl.data import evaluation_sets
from megatron_rl.data.evaluation_sets import EvaluationSet, held_out_set, open_sets
from megatron_rl.errors import ConfigError, DataError
from tests.fakes.groups import make_prompt
from tests.fakes.watch import LoggedWatch

SUMS = {
    "task": "chain_sum",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "prompt_column": "metadata.expression",
}
SHORT = SamplingConfig(max_tokens=20)


def config_of(*sets: EvalSetConfig, **data: Any) -> Config:
    return Config(data=DataConfig(**data), eval=EvalConfig(sets=list(sets), num_samples=4))


def records(num: int) -> list[dict[str, Any]]:
    return [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(num)]


def from_file(path: str, **settings: Any) -> EvalSetConfig:
    return EvalSetConfig(
        **{"name": "sums", "path": path, "prompt_column": "problem", "sampling": SHORT} | settings
    )


def test_the_rows_of_a_file_in_their_order(tokenizer, write_jsonl):
    path = write_jsonl(records(12))
    [found] = open_sets(config_of(from_file(path)), tokenizer, 100)
    assert (found.name, found.num_samples, found.pass_at) == ("sums", 4, (4,))
    assert found.sampling == SHORT
    assert [prompt.index for prompt in found.prompts] == list(range(12))
    assert [prompt.answer for prompt in found.prompts] == [str(n + 1) for n in range(12)]
    assert {prompt.source for prompt in found.prompts} == {"eval/sums"}
    assert found.prompts[3].text == "What is 3 + 1?"
    assert tokenizer.decode(found.prompts[3].token_ids) == "<bos>What is 3 + 1?"
    assert found.prompts[3].metadata == {"problem": "What is 3 + 1?", "answer": "4"}


def test_some_rows_keep_their_numbers(tokenizer, write_jsonl):
    path = write_jsonl(records(40))
    [whole] = open_sets(config_of(from_file(path)), tokenizer, 100)
    [some] = open_sets(config_of(from_file(path, num_rows=10)), tokenizer, 100)
    [fewer] = open_sets(config_of(from_file(path, num_rows=5)), tokenizer, 100)
    assert len(some.prompts) == 10
    assert all(whole.prompts[prompt.index] == prompt for prompt in some.prompts)
    indices = [prompt.index for prompt in some.prompts]
    assert indices == sorted(indices) != list(range(10))  # drawn from the whole file
    assert {prompt.index for prompt in fewer.prompts} < set(indices)
    [other] = open_sets(config_of(from_file(path, num_rows=10), held_out_seed=7), tokenizer, 100)
    assert [prompt.index for prompt in other.prompts] != indices
    with pytest.raises(DataError, match=r"sets\[0\]\.num_rows: expected at most the 40 rows of"):
        open_sets(config_of(from_file(path, num_rows=41)), tokenizer, 100)


def test_the_questions_of_a_task_depend_on_the_name_alone(tokenizer, write_jsonl, monkeypatch):
    easy = EvalSetConfig(name="easy", num_rows=50, num_samples=2, sampling=SHORT, **SUMS)
    other = EvalSetConfig(name="other", num_rows=50, sampling=SHORT, **SUMS)
    [first, second] = open_sets(config_of(easy, other), tokenizer, 100)
    assert (first.num_samples, second.num_samples) == (2, 4)
    assert [prompt.index for prompt in first.prompts] == list(range(50))
    assert len({prompt.text for prompt in first.prompts}) == 50  # of the 162 of this task
    assert {prompt.text for prompt in first.prompts} != {prompt.text for prompt in second.prompts}
    file = from_file(write_jsonl(records(3)))
    assert open_sets(config_of(file, easy), tokenizer, 100)[1] == first
    assert first.prompts[0].metadata["task"] == "chain_sum"
    monkeypatch.setattr(evaluation_sets, "_DRAWS_PER_QUESTION", 1)
    with pytest.raises(DataError, match=r"expected 500 different questions of chain_sum, got \d+:"):
        open_sets(
            config_of(EvalSetConfig(name="many", num_rows=500, sampling=SHORT, **SUMS)),
            tokenizer,
            100,
        )


def test_missing_files_are_told_together_with_the_way_to_leave_them_out(tokenizer, write_jsonl):
    there = from_file(write_jsonl(records(3)))
    absent = from_file("data/aime24.parquet", name="aime24", origin="HuggingFaceH4/aime_2024")
    also = from_file(["data/none-*.jsonl"], name="amc23")
    with pytest.raises(DataError) as caught:
        open_sets(config_of(there, absent, also), tokenizer, 100)
    assert str(caught.value) == (
        "eval.sets: expected the files of every set, found none for aime24 at data/aime24.parquet "
        "(from HuggingFaceH4/aime_2024); amc23 at data/none-*.jsonl: put them there, or leave sets "
        "out by eval.skip=[aime24,amc23]"
    )
    config = Config(eval=EvalConfig(sets=[there, absent, also], skip=["aime24", "amc23"]))
    assert [each.name for each in open_sets(config, tokenizer, 100)] == ["sums"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompt_column": "question"}, r"'question' \(eval\.sets\[0\]\.prompt_column\), got prob"),
        ({"answer_column": "solution"}, r"'solution' \(eval\.sets\[0\]\.answer_column\)"),
        (
            {"path": "", "task": "chain_sums", "num_rows": 3},
            r"^eval\.sets\[0\]\.task: expected a re.*mini_sudoku\)$",
        ),
        (
            {"path": "", "name": "gym", "num_rows": 3},
            r"^eval\.sets\[0\]\.name: .*'gym' .*; write task: <name of the reasoning-gym task> be",
        ),
        (
            {"path": "", "task": "chain_sum", "options": {"max": 3}, "num_rows": 3},
            r"eval\.sets\[0\]: chain_sum: unknown option 'max'",
        ),
    ],
)
def test_what_cannot_be_read_is_named_by_its_setting(settings, expected, tokenizer, write_jsonl):
    path = write_jsonl(records(3))
    with pytest.raises((ConfigError, DataError), match=expected):
        open_sets(config_of(from_file(**{"path": path} | settings)), tokenizer, 100)


def test_a_question_must_leave_room_for_its_response(tokenizer, write_jsonl):
    lines = [*records(3), {"problem": "How many? " * 10, "answer": "1"}]
    one = from_file(write_jsonl(lines))
    with pytest.raises(DataError, match=r"sums, question 3: expected at most 80 tokens, the conte"):
        open_sets(config_of(one), tokenizer, 100)
    watch = LoggedWatch()
    [found] = open_sets(config_of(one, overlong="drop"), tokenizer, 100, watch)
    assert [prompt.index for prompt in found.prompts] == [0, 1, 2]
    assert watch.lines == [
        "eval/sums: 1 questions of more than 80 tokens are dropped (data.overlong=drop)"
    ]
    with pytest.raises(DataError, match=r"expected questions of at most 5 tokens, .*, got none"):
        open_sets(config_of(one, overlong="drop"), tokenizer, 25)
    with pytest.raises(ConfigError, match=r"sets\[0\]\.sampling\.max_tokens: expected below .* 20"):
        open_sets(config_of(one), tokenizer, 20)


def test_a_set_has_a_template_and_a_system_prompt_of_its_own(chat_tokenizer, write_jsonl):
    path = write_jsonl(records(1))
    plain = from_file(path, template="Solve: {prompt}")
    own = from_file(path, name="own", system_prompt="Be brief.")
    found = open_sets(config_of(plain, own, system_prompt="Think."), chat_tokenizer, 100)
    texts = [each.prompts[0].text for each in found]
    assert texts == [
        "[system]Think.<eos>[user]Solve: What is 0 + 1?<eos>[assistant]",
        "[system]Be brief.<eos>[user]What is 0 + 1?<eos>[assistant]",
    ]


def test_repeated_rows_count_once_unless_they_are_kept(tokenizer, write_jsonl):
    path = write_jsonl(records(2) * 16)  # as some files repeat a benchmark for avg@k
    [found] = open_sets(config_of(from_file(path)), tokenizer, 100)
    [kept] = open_sets(config_of(from_file(path), repeats="keep"), tokenizer, 100)
    assert (len(found.prompts), len(kept.prompts)) == (2, 32)


def test_a_list_column_by_its_position(tokenizer, tmp_path: Path):
    """As OlympiadBench has its answers."""
    path = tmp_path / "olympiad.jsonl"
    path.write_text(json.dumps({"question": "2 x 3", "final_answer": ["6"]}) + "\n")
    one = from_file(str(path), prompt_column="question", answer_column="final_answer.0")
    [found] = open_sets(config_of(one), tokenizer, 100)
    assert found.prompts[0].answer == "6"


def test_the_held_out_prompts_are_a_set_without_a_name():
    config = EvalConfig(num_samples=3, sampling=SHORT)
    assert held_out_set([make_prompt(0)], config) == EvaluationSet(
        name="", prompts=(make_prompt(0),), num_samples=3, pass_at=(3,), sampling=SHORT
    )
