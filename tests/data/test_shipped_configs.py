"""The files of configs/ load, and tiny files in the layouts they name go on to a reward."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config, replaced_keys
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
    assert {"dapo", "dapo_30b_a3b", "gsm8k", "quickstart"} <= {path.stem for path in paths}
    for path in paths:
        assert load_config(path).run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("name", "initial", "tolerance"), [("dapo", 0.1, 0.0037), ("dapo_30b_a3b", 0.05, 0.0050)]
)
def test_the_papers_runs_have_the_published_settings(name, initial, tolerance):
    config = load_config(CONFIGS / f"{name}.yaml")
    objective, learner, optimizer = config.objective, config.learner, config.learner.optimizer
    constraint, sampling, evaluation = objective.constraint, config.rollout.sampling, config.eval
    prompts = config.loop.prompts_per_step
    assert (config.loop.samples_per_prompt, prompts) == (8, 64)
    assert prompts // learner.mini_batches_per_step == 16
    assert (optimizer.learning_rate, optimizer.betas) == (1e-6, (0.9, 0.95))
    assert (optimizer.epsilon, optimizer.weight_decay, optimizer.decay) == (1e-15, 0, "constant")
    assert (constraint.learning_rate, constraint.initial) == (1, initial)
    assert (constraint.tolerance, constraint.minimum, constraint.maximum) == (tolerance, 0, 10)
    assert (objective.preset, replaced_keys(config)) == ("dc_grpo", [])
    assert (objective.clip_low, objective.clip_high) == (0.2, 0.24)
    assert (objective.normalize, objective.kl.coefficient) == ("sequence_mean", 0)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1, 1, 8192)
    assert (evaluation.sampling.temperature, evaluation.sampling.top_p) == (0.7, 1)
    assert evaluation.sampling.max_tokens == 32768
    room = config.rollout.max_model_len - evaluation.sampling.max_tokens
    assert room >= config.data.max_prompt_tokens


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
