"""Updates that are taken back, on a real engine and two ranks: the weights that are published again
are those from before the update, to the last bit, and a resumed run goes on as one that was not
interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine

# With a float32 engine J of both sides agrees within rounding: nothing is accepted with a bound of
# -1, and everything with one of 1e-3.
NEVER, ALWAYS = "objective.acceptance.max_loss=-1", "objective.acceptance.max_loss=1e-3"


def test_what_is_taken_back_is_published_again(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    config = write_config(
        tmp_path,
        objective={"preset": "mipu", "constraint": {"enabled": True}},
        rollout={"sampling": {"max_tokens": 8}},
        loop={"num_steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4},
        checkpoint={"every": 1, "save_hf": False},
    )
    whole, rest = tmp_path / "whole", tmp_path / "rest"

    def train(run_dir: Path, *overrides: str) -> None:
        train_to_the_end(config, *overrides, num_ranks=2, run_dir=run_dir, engine=served_engine)

    train(whole, NEVER)
    updates = read_jsonl(whole / "sync.jsonl")
    assert [line["version"] for line in updates] == [0, 1, 1, 2, 2]
    first, updated, again, updated_again, last = (line["published"] for line in updates)
    assert first == again == last
    assert first not in (updated, updated_again)
    lines = read_jsonl(whole / "metrics.jsonl")[1:]
    for line in lines:
        assert line["acceptance/is_taken_back"] == 1
        assert abs(line["acceptance/loss"]) < 1e-4  # both sides score the same tokens
        assert line["acceptance/engine_objective/mean"] != 0
        assert line["learner/grad_norm"] > 0
    # Lambda kept its dual steps, and the schedule is where it began.
    assert lines[0]["constraint/next_lambda"] != lines[0]["constraint/lambda"]
    assert lines[1]["constraint/lambda"] == lines[0]["constraint/next_lambda"]
    state = json.loads((whole / "checkpoints/step_000002/run_state.json").read_text())
    assert state["scheduler"]["num_steps"] == 0

    # After the first step, whose update was taken back, another run accepts the second one's.
    train(rest, ALWAYS, f"resume={whole / 'checkpoints/step_000001'}")
    resumed = read_jsonl(rest / "metrics.jsonl")[-1]
    assert resumed["step"] == 2 and resumed["acceptance/is_taken_back"] == 0
    for key in ("discrepancy/mean", "loss/mean", "learner/grad_norm", "constraint/lambda"):
        assert resumed[key] == lines[1][key], key
    assert [line["published"] for line in read_jsonl(rest / "sync.jsonl")] == [first, updated_again]
