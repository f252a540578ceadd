"""Rollouts that the engine samples while the learner trains: in each way of changing the weights
under running requests, and after a run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.records import RolloutGroup
from megatron_rl.rollout.recording import read_step
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine

PER_STEP = 4
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine) -> Train:
    """`train(num_steps, *overrides)` in one run folder; the lines of its steps."""
    config = write_config(
        tmp_path,
        checkpoint={"every": 2, "save_hf": False},
        loop={"prompts_per_step": PER_STEP, "samples_per_prompt": 4},
    )

    def run(num_steps: int, *overrides: str) -> list[dict[str, Any]]:
        folder = tmp_path / "run"
        changes = (f"loop.num_steps={num_steps}", *overrides)
        train_to_the_end(config, *changes, num_ranks=0, run_dir=folder, engine=served_engine)
        return [line for line in read_jsonl(folder / "metrics.jsonl") if line["step"]]

    return run


def groups_of(folder: Path, step: int) -> list[RolloutGroup]:
    return [each.group for each in read_step(folder / "run" / "rollouts", step)]


def versions_of(groups: list[RolloutGroup]) -> set[int]:
    return {int(v) for g in groups for r in g.rollouts for v in r.weight_versions[r.loss_mask]}


def test_one_step_ahead_and_after_a_stop(tmp_path: Path, train: Train) -> None:
    ahead = "rollout.max_policy_age=1"
    for num_steps in (2, 4):  # the second run from the checkpoint of the first
        lines = train(num_steps, ahead)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    used = []
    for line in lines:
        step = line["step"]
        groups = groups_of(tmp_path, step)
        # Drained before each publication: a step is of the version before its own weights, except
        # the first one, and the first one after the stop, whose engine was idle.
        age = 0 if step in (1, 3) else 1
        assert versions_of(groups) == {step - 1 - age}
        assert line["rollout/age/max"] == line["discrepancy/age/max"] == age
        assert line["rollout/spanning_rate/mean"] == line["rollout/num_late"] == 0
        assert 0 <= line["rollout/idle_share/mean"] <= 1
        used += [group.prompt.index for group in groups]
    assert used == list(range(4 * PER_STEP))


@pytest.mark.parametrize("running", ["keep", "recompute"])
def test_a_response_goes_on_with_the_new_weights(
    tmp_path: Path, train: Train, running: str
) -> None:
    lines: list[dict[str, Any]] = []
    # A publication meets an open response or it does not; on a busy machine it may take more steps.
    for num_steps in (4, 8, 12):
        lines = train(
            num_steps,
            "rollout.max_policy_age=2",
            "rollout.hand_out=finished",
            f"sync.running_requests={running}",
            "rollout.sampling.max_tokens=220",
        )
        if any(line["rollout/spanning_rate/mean"] > 0 for line in lines):
            break
    assert max(line["rollout/spanning_rate/mean"] for line in lines) > 0
    used = []
    for line in lines:
        groups = groups_of(tmp_path, line["step"])
        versions = versions_of(groups)
        assert line["step"] - 3 <= min(versions) <= max(versions) <= line["step"] - 1
        for group in groups:
            for rollout in group.rollouts:
                of_tokens = rollout.weight_versions[rollout.loss_mask].tolist()
                assert of_tokens == sorted(of_tokens)
        used += [group.prompt.index for group in groups]
    assert len(used) == len(set(used)) == len(lines) * PER_STEP
