"""The files of configs/ load, and tiny files in the layouts they name go on to a reward."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.data.prompts import PromptStream
from megatron_rl.reward.registry import resolve_verifiers
from megatron_rl.reward.score import Scorer

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_RECORDS = 230  # 200 are held out


def gsm8k_record(n):
    return {"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>So.\n#### {n + 1:,}"}


def dapo_record(n):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve {n} + 1. Answer: $Answer"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }


def test_every_config_is_one_that_loads():
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert {"dapo", "gsm8k", "quickstart"} <= {path.stem for path in paths}
    for path in paths:
        assert load_config(path).run_dir == f"runs/{path.stem}"


def test_dapo_has_the_published_settings():
    config = load_config(CONFIGS / "dapo.yaml")
    constraint, optimizer = config.objective.constraint, config.learner.optimizer
    assert (config.loop.samples_per_prompt, config.loop.prompts_per_step) == (8, 64)
    assert (optimizer.learning_rate, optimizer.betas) == (1e-6, (0.9, 0.95))
    assert (constraint.learning_rate, constraint.initial, constraint.tolerance) == (1, 0.1, 0.0037)
    assert config.objective.clip_high == 0.24
    assert config.rollout.sampling.max_tokens == config.eval.sampling.max_tokens == 8192
    assert (config.eval.sampling.temperature, config.eval.sampling.top_p) == (0.7, 1.0)


@pytest.mark.parametrize(
    ("name", "record", "writer"),
    [("gsm8k", gsm8k_record, "write_jsonl"), ("dapo", dapo_record, "write_parquet")],
)
def test_a_file_of_the_layout_gives_prompts_and_rewards(
    name, record, writer, chat_tokenizer, request
):
    config = load_config(CONFIGS / f"{name}.yaml")
    [task] = config.data.tasks
    path = request.getfixturevalue(writer)([record(n) for n in range(1000, 1000 + NUM_RECORDS)])
    tasks = [replace(task, path=path)]
    stream = PromptStream(
        replace(config.data, tasks=tasks), chat_tokenizer, config.data.max_prompt_tokens
    )
    assert len(stream.held_out()) == 200
    prompts = stream.prompts(0, NUM_RECORDS - 200)
    assert len({prompt.text for prompt in prompts}) == NUM_RECORDS - 200
    for prompt in prompts:
        assert prompt.source == name
        assert f"{int(prompt.answer) - 1} + 1" in prompt.text
        assert prompt.text.startswith("[user]") and prompt.text.endswith("[assistant]")
    prompt = prompts[0]
    responses = [f"So.\n\\boxed{{{prompt.answer}}}", "So.\n\\boxed{7}"]
    if name == "dapo":
        responses = [f"So.\nAnswer: {prompt.answer}", "So.\nAnswer: 7"]
    with Scorer(config.reward, resolve_verifiers(tasks)) as scorer:
        right, wrong = scorer.score_texts([(prompt, response) for response in responses])
    assert right.is_correct
    assert wrong.reward == 0.0 and wrong.failure is None
