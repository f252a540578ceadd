import dataclasses
import json
import random
import re
from collections import Counter

import pytest

from megatron_rl.config import DataConfig, TaskConfig
from megatron_rl.data.prompts import PromptStream
from megatron_rl.errors import ConfigError, DataError
from tests.fakes.watch import LoggedWatch

SUMS = TaskConfig(
    name="chain_sum",
    options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    prompt_column="metadata.expression",
    template="{prompt} =",
)


def gsm8k(num, start=0):
    return [
        {"question": f"What is {n}+1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(start, start + num)
    ]


def file_config(path, **settings):
    return DataConfig(tasks=[TaskConfig(path=path)], **{"num_held_out": 5, **settings})


def test_a_reasoning_task(tokenizer):
    stream = PromptStream(DataConfig(tasks=[SUMS]), tokenizer, 100)
    prompts = stream.prompts(0, 300)
    assert [prompt.index for prompt in prompts] == list(range(300))
    for prompt in prompts:
        expression = prompt.text.removesuffix(" =")
        assert str(eval(expression)) == prompt.answer
        assert prompt.metadata["entry"]["metadata"]["expression"] == expression
        assert tokenizer.decode(prompt.token_ids) == f"<bos>{prompt.text}"
        assert prompt.source == "chain_sum"
        assert json.loads(json.dumps(prompt.metadata)) == prompt.metadata
    assert len({prompt.text for prompt in prompts}) > 250


def test_prompts_are_a_function_of_seed_and_index(tokenizer, write_jsonl):
    config = DataConfig(
        tasks=[
            SUMS,
            TaskConfig(name="gsm8k", path=write_jsonl(gsm8k(40)), weight=2.0),
            TaskConfig(name="word_ladder", weight=0.5),
        ],
        num_held_out=20,
    )
    everything = PromptStream(config, tokenizer, 2000).prompts(0, 600)
    random.seed(1)
    other = PromptStream(config, tokenizer, 2000)
    assert other.prompts(590, 10) == everything[590:]
    assert other.prompts(3, 1) == everything[3:4]
    assert other.prompts(250, 20) == everything[250:270]
    state = random.getstate()
    other.prompts(0, 5)
    assert random.getstate() == state
    reseeded = PromptStream(dataclasses.replace(config, seed=1), tokenizer, 2000)
    assert sum(a == b for a, b in zip(reseeded.prompts(0, 100), everything)) < 5
    assert reseeded.held_out() == other.held_out()
    counts = Counter(prompt.source for prompt in everything)
    assert counts.keys() == {"chain_sum", "gsm8k", "word_ladder"}
    assert 0.45 < counts["gsm8k"] / 600 < 0.7  # 2 of 3.5
    assert 0.08 < counts["word_ladder"] / 600 < 0.21  # 0.5 of 3.5


def test_held_out_prompts_never_appear_in_training(tokenizer):
    # Single digits: 200 questions (+ and -); 80 of them are held out.
    task = dataclasses.replace(SUMS, options={**SUMS.options, "max_digits": 1})
    config = DataConfig(tasks=[task], num_held_out=80)
    stream = PromptStream(config, tokenizer, 100)
    held_out = stream.held_out()
    texts = {prompt.text for prompt in held_out}
    assert len(texts) == len(held_out) == 80
    assert [prompt.index for prompt in held_out] == list(range(80))
    seen = {prompt.text for prompt in stream.prompts(0, 5000)}
    assert len(seen) == 120
    assert not seen & texts
    assert texts == stream.held_out_texts
    shifted = dataclasses.replace(config, held_out_seed=7)
    assert {prompt.text for prompt in PromptStream(shifted, tokenizer, 100).held_out()} != texts


def test_a_task_with_too_few_distinct_prompts(tokenizer):
    task = dataclasses.replace(SUMS, options={**SUMS.options, "max_digits": 1})
    with pytest.raises(
        DataError,
        match=r"data\.num_held_out: expected 201 distinct prompts, got 200: chain_sum .*widen",
    ):
        PromptStream(DataConfig(tasks=[task], num_held_out=201), tokenizer, 100)
    stream = PromptStream(DataConfig(tasks=[task], num_held_out=200), tokenizer, 100)
    with pytest.raises(DataError, match="besides the 200 held-out ones, got none in 1000 draws"):
        stream.prompts(0, 1)


def test_a_file_gives_every_row_once_an_epoch(tokenizer, write_jsonl):
    config = file_config(write_jsonl(gsm8k(45)))
    stream = PromptStream(config, tokenizer, 100)
    held_out = {prompt.text for prompt in stream.held_out()}
    assert len(held_out) == 5
    rest = {record["question"] for record in gsm8k(45)} - held_out
    epochs = [[prompt.text for prompt in stream.prompts(40 * epoch, 40)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(rest)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_gsm8k_layout(tokenizer, write_jsonl, write_parquet):
    for path in (write_jsonl(gsm8k(10)), write_parquet(gsm8k(10))):
        (prompt,) = PromptStream(file_config(path), tokenizer, 100).prompts(0, 1)
        number = int(prompt.text.removeprefix("What is ").removesuffix("+1?"))
        assert prompt.answer == str(number + 1)
        assert prompt.source == "train"
        assert prompt.metadata["question"] == prompt.text


@pytest.mark.parametrize("is_chat", [True, False])
def test_dapo_layout(is_chat, tokenizer, chat_tokenizer, write_parquet):
    records = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"Solve {n}+1. Answer: $Answer"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"id-{n}"},
        }
        for n in range(10)
    ]
    config = DataConfig(
        tasks=[
            TaskConfig(
                name="dapo",
                path=write_parquet(records),
                prompt_column="prompt",
                answer_column="reward_model.ground_truth",
            )
        ],
        num_held_out=4,
        chat_template="auto" if is_chat else "never",
    )
    prompts = PromptStream(config, chat_tokenizer, 100).prompts(0, 6)
    assert len({prompt.text for prompt in prompts}) == 6
    for prompt in prompts:
        n = int(prompt.answer) - 1
        text = f"Solve {n}+1. Answer: $Answer"
        assert prompt.text == (f"[user]{text}<eos>[assistant]" if is_chat else text)
        assert prompt.token_ids[0] == (1 if not is_chat else tokenizer.encode("[")[1])
        assert prompt.metadata["extra_info"] == {"index": f"id-{n}"}


def test_a_prompt_held_out_of_one_file_is_held_out_of_all(tokenizer, write_jsonl):
    twice = write_jsonl(gsm8k(30) + gsm8k(30), "twice.jsonl")
    config = DataConfig(
        tasks=[TaskConfig(path=write_jsonl(gsm8k(30), "once.jsonl")), TaskConfig(path=twice)],
        num_held_out=20,
    )
    stream = PromptStream(config, tokenizer, 100)
    held_out = {prompt.text for prompt in stream.held_out()}
    assert len(held_out) == 20
    seen = {prompt.text for prompt in stream.prompts(0, 200)}
    assert seen == {record["question"] for record in gsm8k(30)} - held_out


def write_text(tmp_path, text, name="bad.jsonl"):
    path = tmp_path / name
    path.write_bytes(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"question": "q", "answer": "1"}\n\n{"question": \n', r"bad\.jsonl, line 3: .*JSON obj"),
        (b"[1]\n", r"bad\.jsonl, line 1: expected a JSON object, got a list"),
        (b'{"question": "\xff"}\n', r"bad\.jsonl, line 1: expected UTF-8"),
        (b"", r"bad\.jsonl: expected at least one record, got an empty data set"),
        (b"\n\n", r"got an empty data set"),
        (
            b'{"question": "q", "answer": "1"}\n{"qestion": "q", "answer": "1"}\n',
            r"line 2: expected a column 'question' \(data\.tasks\[0\]\.prompt_col.*nearest: qe",
        ),
        (b'{"question": "q", "anser": "1"}\n', r"line 1: .*answer_column.*nearest: anser"),
    ],
)
def test_bad_files_are_refused_at_the_start(text, message, tokenizer, tmp_path):
    with pytest.raises(DataError, match=message):
        PromptStream(file_config(write_text(tmp_path, text)), tokenizer, 100)


def test_other_bad_files(tokenizer, tmp_path, write_jsonl, write_parquet):
    for name, message in [
        ("none.jsonl", r"expected a file \(data\.tasks\[0\]\.path\), found none"),
        ("list.txt", "found none"),
    ]:
        with pytest.raises(DataError, match=message):
            PromptStream(file_config(str(tmp_path / name)), tokenizer, 100)
    with pytest.raises(DataError, match="expected a Parquet file"):
        path = write_text(tmp_path, b"PAR1 not really", "bad.parquet")
        PromptStream(file_config(path), tokenizer, 100)
    with pytest.raises(DataError, match=r"row 0: expected a column 'question'.*nearest: query"):
        PromptStream(file_config(write_parquet([{"query": "q"}])), tokenizer, 100)
    with pytest.raises(DataError, match=r"expected 5 distinct prompts, got 3: train .*larger file"):
        PromptStream(file_config(write_jsonl(gsm8k(3) * 4)), tokenizer, 100)
    with pytest.raises(DataError, match="besides the held-out ones, got none"):
        PromptStream(file_config(write_jsonl(gsm8k(5))), tokenizer, 100)


def test_a_prompt_that_is_too_long(tokenizer, write_jsonl):
    path = write_jsonl([*gsm8k(20), {"question": "x" * 50, "answer": "1"}])
    with pytest.raises(
        DataError,
        match=r"train\.jsonl, line 21: expected at most 30 tokens, got 51.*data\.max_prompt_tokens",
    ):
        PromptStream(file_config(path, num_held_out=0), tokenizer, 30)
    assert len(PromptStream(file_config(path), tokenizer, 51).prompts(0, 16)) == 16
    stream = PromptStream(DataConfig(tasks=[SUMS], num_held_out=0), tokenizer, 8)
    with pytest.raises(
        DataError,
        match=r"prompt \d+ of chain_sum: expected at most 8 tokens, got 10.*data\.max_prompt",
    ):
        stream.prompts(0, 50)
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens: .*got 0 tokens"):
        PromptStream(DataConfig(tasks=[SUMS]), tokenizer, 0)


def test_tasks_that_cannot_be(tokenizer):
    for task, message in [
        (
            TaskConfig(name="chain_sums"),
            r"^data\.tasks\[0\]\.name: .*reasoning-gym task .*'chain_sums' \(nearest: chain_sum,",
        ),
        (TaskConfig(name="chain_sum", options={"max_term": 3}), "'max_term' .*nearest: max_terms"),
        (TaskConfig(name="chain_sum", options={"seed": 3}), r"change data\.seed"),
        (TaskConfig(name="chain_sum", options={"min_terms": 9}), "max_terms must be >= min_terms"),
        (TaskConfig(name="chain_sum", options={"min_terms": "a"}), "expected options that the"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PromptStream(DataConfig(tasks=[task]), tokenizer, 100)
    with pytest.raises(ConfigError, match=r"data\.tasks: expected at least one"):
        PromptStream(DataConfig(), tokenizer, 100)
    with pytest.raises(DataError, match=r"prompt_column.*nearest: metadata\.expression"):
        PromptStream(
            DataConfig(tasks=[dataclasses.replace(SUMS, prompt_column="metadata.expresion")]),
            tokenizer,
            100,
        ).prompts(0, 1)


@pytest.mark.parametrize("name", ["countdown", "acre", "rearc", "graph_color", "gsm_symbolic"])
def test_tasks_of_every_kind_give_prompts(name, tokenizer):
    config = DataConfig(tasks=[TaskConfig(name=name)], num_held_out=3)
    prompts = PromptStream(config, tokenizer, 10**6).prompts(0, 3)
    assert PromptStream(config, tokenizer, 10**6).prompts(2, 1) == prompts[2:]
    assert all(prompt.metadata["entry"]["question"] for prompt in prompts)


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer, write_jsonl):
    rows = [*gsm8k(20), *({"question": f"{n}" * 40, "answer": "1"} for n in range(3))]
    config = file_config(write_jsonl(rows), overlong="drop")
    watch = LoggedWatch()
    stream = PromptStream(config, tokenizer, 30, watch)
    texts = {prompt.text for prompt in (*stream.held_out(), *stream.prompts(0, 15))}
    assert texts == {row["question"] for row in gsm8k(20)}
    assert watch.lines == [
        "train: 3 of its rows are dropped, with more than 30 tokens (data.max_prompt_tokens, "
        "data.overlong=drop)"
    ]
    watch = LoggedWatch()
    assert len(PromptStream(config, tokenizer, 41, watch).prompts(0, 18)) == 18
    assert watch.lines == []
    with pytest.raises(DataError, match=r"expected 5 distinct prompts, got 0: .* 23 have more th"):
        PromptStream(config, tokenizer, 10)
    with pytest.raises(DataError, match=r"got none: .*raise data\.max_prompt_tokens"):
        PromptStream(dataclasses.replace(config, num_held_out=0), tokenizer, 10)


def test_questions_of_a_task_that_are_too_long_are_drawn_anew(tokenizer):
    # "1 + 2 =" has 7 characters and a bos, "-1 + 23 =" more.
    config = DataConfig(tasks=[SUMS], num_held_out=20, overlong="drop")
    watch = LoggedWatch()
    stream = PromptStream(config, tokenizer, 8, watch)
    prompts = [*stream.held_out(), *stream.prompts(0, 50)]
    assert {len(prompt.token_ids) for prompt in prompts} == {8}
    [line] = watch.lines
    assert re.match(r"chain_sum: \d+ of the \d+ questions that were drawn .* 8 tokens", line)
    with pytest.raises(DataError, match=r"expected 20 distinct prompts, got 0"):
        PromptStream(config, tokenizer, 5)


def test_a_repeat_is_in_an_epoch_once_unless_it_is_kept(tokenizer, write_jsonl):
    path = write_jsonl(gsm8k(10) * 3)
    stream = PromptStream(file_config(path), tokenizer, 100)
    assert len({prompt.text for prompt in stream.prompts(0, 5)}) == 5
    stream = PromptStream(file_config(path, repeats="keep"), tokenizer, 100)
    assert Counter(Counter(prompt.text for prompt in stream.prompts(0, 15)).values()) == {3: 5}


def test_the_system_prompt_of_a_task_comes_before_that_of_all(chat_tokenizer, write_jsonl):
    tasks = [
        TaskConfig(name="all", path=write_jsonl(gsm8k(3), "a.jsonl")),
        TaskConfig(name="own", path=write_jsonl(gsm8k(3, 10), "b.jsonl"), system_prompt="Own."),
        TaskConfig(name="none", path=write_jsonl(gsm8k(3, 20), "c.jsonl"), system_prompt=""),
        dataclasses.replace(SUMS, name="chain_sum"),
    ]
    config = DataConfig(tasks=tasks, num_held_out=0, system_prompt="Be brief.")
    starts = {
        "all": "[system]Be brief.<eos>[user]What",
        "own": "[system]Own.<eos>[user]What",
        "none": "[user]What",
        "chain_sum": "[system]Be brief.<eos>[user]",
    }
    prompts = PromptStream(config, chat_tokenizer, 200).prompts(0, 60)
    assert {prompt.source for prompt in prompts} == starts.keys()
    assert all(prompt.text.startswith(starts[prompt.source]) for prompt in prompts)


def test_an_answer_may_be_empty_only_for_a_verifier_of_the_users_own(tokenizer, write_jsonl):
    path = write_jsonl([{"question": "q", "answer": ""}])
    for verifier in ("auto", "exact", "numeric"):
        task = TaskConfig(path=path, verifier=verifier)
        with pytest.raises(DataError, match=r"line 1: expected an answer in column 'answer'"):
            PromptStream(DataConfig(tasks=[task], num_held_out=0), tokenizer, 100)
    task = TaskConfig(path=path, verifier="mine:verify")
    [prompt] = PromptStream(DataConfig(tasks=[task], num_held_out=0), tokenizer, 100).prompts(0, 1)
    assert prompt.answer == ""


def test_answers_that_a_verifier_cannot_read(tokenizer, write_jsonl):
    def is_even(answer):
        if int(answer) % 2:
            raise ValueError(f"expected an even number, got {answer!r}")

    config = file_config(write_jsonl(gsm8k(20)))
    with pytest.raises(DataError, match=r"train.jsonl, line 1: column 'answer' .* even number"):
        PromptStream(config, tokenizer, 100, answer_checks={"train": is_even})
    PromptStream(config, tokenizer, 100, answer_checks={"other": is_even})
    config = dataclasses.replace(config, unreadable_answers="drop")
    stream = PromptStream(config, tokenizer, 100, answer_checks={"train": is_even})
    answers = [int(prompt.answer) for prompt in (*stream.held_out(), *stream.prompts(0, 5))]
    assert sorted(answers) == list(range(2, 21, 2))


def test_expected_answers_to_try(tokenizer, write_jsonl):
    tasks = [SUMS, TaskConfig(path=write_jsonl(gsm8k(40)))]
    stream = PromptStream(DataConfig(tasks=tasks, num_held_out=10), tokenizer, 100)
    found = stream.expected_answers(4)
    assert [prompt.source for _, prompt in found] == ["chain_sum"] * 4 + ["train"] * 4
    assert found[0][0] == f"held-out prompt {found[0][1].index}"
    where, last = found[-1]
    line = int(where.removesuffix(", column 'answer'").rpartition("line ")[2])
    assert (last.answer, last.metadata["question"]) == (str(line), f"What is {line - 1}+1?")


def test_fingerprints_tell_the_questions_of_each_task_from_others(tokenizer, write_jsonl):
    def fingerprints(rows):
        config = DataConfig(tasks=[TaskConfig(path=write_jsonl(rows)), SUMS], num_held_out=2)
        return json.loads(json.dumps(PromptStream(config, tokenizer, 100).fingerprints()))

    [rows, task] = fingerprints(gsm8k(10))
    assert rows.keys() == {"num_rows", "digest"} and task.keys() == {"reasoning_gym"}
    assert fingerprints(gsm8k(10)) == [rows, task]
    assert fingerprints(gsm8k(10)[::-1])[0] != rows


def test_a_template_that_refuses_a_row_is_one_line(chat_tokenizer, write_jsonl):
    chat_tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    config = file_config(write_jsonl(gsm8k(10)), system_prompt="Be brief.", num_held_out=0)
    with pytest.raises(DataError) as caught:
        PromptStream(config, chat_tokenizer, 100)
    assert re.search(
        r"train\.jsonl, line 1: expected messages that the chat template accepts, got system, "
        r"user: System role not supported; change them, or name .*data\.chat_template_file",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
