"""Groups without signal are sampled anew from the real engine, on two replicas, and a replay of the
record on one learns the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.rollout.recording import read_recomputed, read_step
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine
from tests.support.short_run import chain_sums

PROMPTS, SAMPLES, STEPS = 4, 4, 3


def test_dropped_groups_are_refilled(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    task = chain_sums("tests.e2e.reward:even_answers_only")
    config = write_config(
        tmp_path,
        data={"tasks": [task], "num_held_out": 0},
        rollout={
            "quantization": {"format": "int8"},  # a gap to the float32 learner
            "sampling": {"max_tokens": 20},
        },
        sync={"probe_tolerance": 0.1},
        learner={"tokens_per_micro_batch": 256, "optimizer": {"learning_rate": 1e-3}},
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
