import dataclasses

import pytest

from megatron_rl.config import Config, DataConfig, LearnerConfig, TaskConfig, WarmStartConfig
from megatron_rl.data.pairs import PairStream
from megatron_rl.data.prompts import PromptStream
from megatron_rl.errors import DataError
from tests.fakes.watch import LoggedWatch

SUMS = TaskConfig(
    name="chain_sum",
    options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    prompt_column="metadata.expression",
    template="{prompt} =",
)


def test_pairs_of_the_tasks(tokenizer):
    config = Config(data=DataConfig(tasks=[SUMS]))
    stream = PairStream(config, tokenizer)
    pairs = stream.pairs(0, 200)
    held_out = {p.token_ids for p in PromptStream(config.data, tokenizer, 100).held_out()}
    for prompt_ids, response_ids in pairs:
        expression = tokenizer.decode(prompt_ids[1:]).removesuffix(" =")
        assert tokenizer.decode(response_ids) == f"{eval(expression)}<eos>"
        assert prompt_ids not in held_out
    assert PairStream(config, tokenizer).pairs(150, 50) == pairs[150:]
    rl_prompts = [p.token_ids for p in PromptStream(config.data, tokenizer, 100).prompts(0, 200)]
    assert rl_prompts != [prompt_ids for prompt_ids, _ in pairs]


def test_pairs_of_a_file_leave_the_held_out_prompts_of_the_tasks_out(tokenizer, write_jsonl):
    data = DataConfig(
        tasks=[dataclasses.replace(SUMS, options={**SUMS.options, "max_digits": 1})],
        num_held_out=100,
    )
    held_out = [prompt.text for prompt in PromptStream(data, tokenizer, 100).held_out()]
    records = [{"prompt": text, "response": "never"} for text in held_out]
    records += [{"prompt": f"{n}?", "response": f"so\n#### {n}"} for n in range(10)]
    config = Config(data=data, warm_start=WarmStartConfig(path=write_jsonl(records)))
    pairs = PairStream(config, tokenizer).pairs(0, 10)
    decoded = sorted((tokenizer.decode(a), tokenizer.decode(b)) for a, b in pairs)
    assert decoded == [(f"<bos>{n}?", f"so\n#### {n}<eos>") for n in range(10)]


def test_bad_pairs(tokenizer, write_jsonl):
    path = write_jsonl([{"prompt": "p", "respose": "r"}])
    with pytest.raises(DataError, match=r"warm_start\.response_column.*nearest: respose"):
        PairStream(Config(warm_start=WarmStartConfig(path=path)), tokenizer)
    path = write_jsonl([{"prompt": "p", "response": "r" * 400}])
    config = Config(
        warm_start=WarmStartConfig(path=path), learner=LearnerConfig(tokens_per_micro_batch=300)
    )
    with pytest.raises(DataError, match=r"pair 0: expected at most 300 tokens, got 403"):
        PairStream(config, tokenizer).pairs(0, 1)
    with pytest.raises(DataError, match=r"warm_start\.path: expected a file, or data\.tasks"):
        PairStream(Config(), tokenizer)
    config = Config(data=DataConfig(tasks=[TaskConfig(name="graph_color")], num_held_out=2))
    with pytest.raises(DataError, match="graph_color: expected prompts with one answer"):
        PairStream(config, tokenizer).pairs(0, 1)


def test_long_pairs_are_dropped_too(tokenizer, write_jsonl):
    records = [{"prompt": f"{n}?", "response": f"{n}" * (400 if n == 3 else 1)} for n in range(9)]
    config = Config(
        data=DataConfig(overlong="drop"),
        warm_start=WarmStartConfig(path=write_jsonl(records)),
        learner=LearnerConfig(tokens_per_micro_batch=300),
    )
    watch = LoggedWatch()
    pairs = PairStream(config, tokenizer, watch).pairs(0, 8)
    assert len(set(pairs)) == 8
    assert watch.lines == [
        "warm start: 1 pairs are dropped, with more than 300 tokens "
        "(learner.tokens_per_micro_batch, data.overlong=drop)"
    ]
