"""The files of configs/ load, and tiny files in the layouts they name go on to a reward."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config, replaced_keys
from megatron_rl.data.evaluation_sets import open_sets
from megatron_rl.data.prompts import PromptStream
from megatron_rl.errors import DataError
from megatron_rl.loop.verifiers import set_verifiers_of
from megatron_rl.reward.expected import answer_checks
from megatron_rl.reward.registry import resolve_verifiers
from megatron_rl.reward.score import Scorer

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_RECORDS = 230  # of which 200 may be held out
SETS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")


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
    num_held_out = 200 if name == "gsm8k" else 0
    assert len(stream.held_out()) == num_held_out
    prompts = stream.prompts(0, NUM_RECORDS - num_held_out)
    assert len({prompt.text for prompt in prompts}) == NUM_RECORDS - num_held_out
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


def test_the_papers_sets_have_the_published_numbers_of_responses():
    config = load_config(CONFIGS / "evaluation" / "math.yaml")
    for name in ("dapo", "dapo_30b_a3b"):
        assert load_config(CONFIGS / f"{name}.yaml").eval.sets == config.eval.sets
    used = config.eval.used_sets().values()
    assert [each.name for each in used] == list(SETS)
    assert [each.num_samples for each in used] == [32, 32, 32, 4, 4, 4]
    for each in used:
        sampling = each.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.7, 1, 32768)
        assert each.origin and each.verifier == "math_verify"


def test_files_as_they_are_published_give_questions_and_rewards(
    chat_tokenizer, write_jsonl, write_parquet
):
    """Two rows of each set, with the columns and the kinds of answers that the files have."""
    rows = {
        "aime24": ["033", "204"],
        "aime25": ["70", "588"],
        "amc23": ["27.0", "36.0"],
        "math500": [r"\left( 3, \frac{\pi}{2} \right)", r"p - q"],
        "minerva": ["2e33", r"\arctan{10}"],
        "olympiadbench": [["$2$"], [r"$(1,8,19), (2,7,13), (4,5,7)$"]],
    }
    config = load_config(CONFIGS / "evaluation" / "math.yaml")
    sets = []
    for each in config.eval.sets:
        column = each.prompt_column
        records = [
            {"id": n, column: f"Question {n}?", each.answer_column.partition(".")[0]: answer}
            for n, answer in enumerate(rows[each.name])
        ]
        write = write_parquet if each.path.endswith(".parquet") else write_jsonl
        sets.append(replace(each, path=write(records, name=Path(each.path).name)))
    config = replace(config, eval=replace(config.eval, sets=sets))
    checks = answer_checks(set_verifiers_of(config))
    found = open_sets(config, chat_tokenizer, config.rollout.max_model_len, None, checks)
    assert [each.name for each in found] == list(SETS)
    with Scorer(config.reward, set_verifiers_of(config)) as scorer:
        for each in found:
            assert len(each.prompts) == 2 and "Question 1?" in each.prompts[1].text
            right = [f"So\n\\boxed{{{prompt.answer.strip('$')}}}." for prompt in each.prompts]
            scores = scorer.score_texts([*zip(each.prompts, right)])
            assert [score.reward for score in scores] == [1.0, 1.0], each.name
            [wrong] = scorer.score_texts([(each.prompts[0], "So \\boxed{17}.")])
            assert wrong.reward == 0.0


def test_missing_files_of_the_sets_are_one_line_that_says_where_to_get_them(
    chat_tokenizer, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / "dapo.yaml", ["eval.skip=[minerva]"])
    with pytest.raises(DataError) as caught:
        open_sets(config, chat_tokenizer, config.rollout.max_model_len)
    message = str(caught.value)
    assert (
        "aime24 at data/eval/aime24.parquet (from Hugging Face: HuggingFaceH4/aime_2024" in message
    )
    assert message.endswith("eval.skip=[aime24,aime25,amc23,math500,olympiadbench]")
    assert "\n" not in message
