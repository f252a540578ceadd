"""Groups without signal are sampled anew from the real engine, on two replicas, and a replay of the
record on one learns the same. The replicas also share the evaluation of two sets, and the engine
gives the same figures when it is evaluated without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rollout.recording import read_recomputed, read_step
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.ranks import run_module
from tests.support.served_engine import ServedEngine
from tests.support.short_run import chain_sums

PROMPTS, SAMPLES, STEPS = 4, 4, 3


def test_dropped_groups_are_refilled(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    task = chain_sums("tests.e2e.reward:even_answers_only")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f'{{"question": "{n}+1=", "answer": ""}}\n' for n in range(7)))
    config = write_config(
        tmp_path,
        data={"tasks": [task], "num_held_out": 0},
        rollout={
            "quantization": {"format": "int8"},  # a gap to the float32 learner
            "sampling": {"max_tokens": 20},
        },
        sync={"probe_tolerance": 0.1},
        learner={"tokens_per_micro_batch": 256, "optimizer": {"learning_rate": 1e-3}},
        eval=evaluation(task, questions),
        loop={
            "num_steps": STEPS,
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "dynamic_sampling": {"enabled": True, "max_rounds": 20},
        },
    )
    live, again = tmp_path / "live", tmp_path / "again"
    train_to_the_end(config, num_ranks=2, run_dir=live, engine=served_engine)
    metrics = read_jsonl(live / "metrics.jsonl")[1:]
    next_prompt, num_dropped = 0, 0
    for line in metrics:
        recorded = read_step(live / "rollouts", line["step"])
        groups, scores = [each.group for each in recorded], [each.scores for each in recorded]
        indices = [group.prompt.index for group in groups]
        assert indices == list(range(next_prompt, next_prompt + len(groups)))  # each once
        next_prompt += len(groups)
        has_signal = [len({score.reward for score in of_group}) > 1 for of_group in scores]
        assert has_signal == [int(group.prompt.answer) % 2 == 0 for group in groups]
        assert sum(has_signal) == PROMPTS
        assert has_signal[-1]  # the last round filled the batch
        assert line["rollout/num_prompts"] == len(groups)
        assert line["rollout/kept_rate/mean"] == PROMPTS / len(groups)
        assert (line["rollout/num_rounds"] > 1) == (len(groups) > PROMPTS)
        num_dropped += len(groups) - PROMPTS
        # What was dropped went through the learner too.
        recomputed = read_recomputed(live / "rollouts", line["step"])
        assert len(recomputed) == len(groups) * SAMPLES
        # The mean is over every sampled token, dropped or not.
        gaps = [
            abs(train - engine)
            for group in groups
            for index, rollout in enumerate(group.rollouts)
            for train, engine, kept in zip(
                recomputed[group.prompt.index, index].double().exp().tolist(),
                map(math.exp, rollout.rollout_logprobs),
                rollout.loss_mask,
            )
            if kept
        ]
        assert line["discrepancy/mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    assert num_dropped > 0
    state = json.loads((live / f"checkpoints/step_{STEPS:06d}/run_state.json").read_text())
    assert state["run"]["next_prompt"] == next_prompt

    check_evaluation(config, metrics[-1], live, served_engine)

    train_to_the_end(config, f"replay={live / 'rollouts'}", num_ranks=0, run_dir=again)
    for line, expected in zip(read_jsonl(again / "metrics.jsonl")[1:], metrics, strict=True):
        for key in (
            "discrepancy/mean",
            "constraint/next_lambda",
            "loss/mean",
            "learner/grad_norm",
            "rollout/num_prompts",
        ):
            assert line[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key


def evaluation(task: dict[str, Any], questions: Path) -> dict[str, Any]:
    """A set of a task and one of a file of seven questions, after the last step."""
    file = {"name": "file", "path": str(questions), "verifier": "tests.e2e.reward:has_a_digit"}
    return {
        "at_start": False,
        "at_end": True,
        "sampling": {"max_tokens": 12},
        "sets": [
            {**task, "name": "sums", "task": "chain_sum", "num_rows": 5, "num_samples": 4},
            {**file, "num_samples": 3, "pass_at": [1, 3]},
        ],
    }


def check_evaluation(
    config: Path, trained: dict[str, float], run_dir: Path, engine: ServedEngine
) -> None:
    """The engine still has the weights of the last step."""
    for name, rows, samples in (("sums", 5, 4), ("file", 7, 3)):
        recorded = read_step(run_dir / "rollouts" / "eval" / name, STEPS)
        assert [len(each.scores) for each in recorded] == [samples] * rows
        correct = [score.is_correct for each in recorded for score in each.scores]
        assert trained[f"eval/{name}/avg_at_{samples}"] == pytest.approx(
            sum(correct) / len(correct)
        )
    assert trained["eval/file/pass_at_1"] == pytest.approx(trained["eval/file/avg_at_3"])
    assert 0 < trained["eval/file/avg_at_3"] < trained["eval/file/pass_at_3"]
    told = run_module(
        "megatron_rl.evaluate",
        config,
        f"run_dir={run_dir}",
        *engine.overrides(),
        ranks=0,
        variables=engine.variables(),
    ).stdout
    results = json.loads((run_dir / "evaluations" / "0001" / "results.json").read_text())
    assert results["weights_version"] == STEPS
    # Two replicas add up a mean in another order than one.
    assert results["figures"] == pytest.approx(
        {key: value for key, value in trained.items() if key.startswith("eval/")}
    )
    assert f"pass@3 {trained['eval/file/pass_at_3']:.3f}" in told
