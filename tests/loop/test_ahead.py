"""A run that samples ahead, and what its checkpoints keep of it: with engines made up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rl.config import (
    CheckpointConfig,
    Config,
    ConstraintConfig,
    LoopConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.errors import ConfigError
from megatron_rl.loop.ahead import AHEAD, ahead_source, check_ledger, save_ahead
from megatron_rl.loop.state import LoopState, initial_state
from megatron_rl.records import RolloutGroup, Score
from megatron_rl.rollout.buffer import BufferedSource
from megatron_rl.rollout.recording import has_step
from megatron_rl.rollout.single_turn import SingleTurn
from megatron_rl.rollout.source import RolloutRequest
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_prompt, make_scores
from tests.fakes.learner import FakeParallel

PER_STEP = 3
DEADLINE = 5.0


def make_config(folder: Path, **rollout: object) -> Config:
    settings = {"max_policy_age": 2, "sampling": SamplingConfig(max_tokens=4), **rollout}
    return Config(
        run_dir=str(folder),
        rollout=RolloutConfig(**settings),
        loop=LoopConfig(num_steps=20, prompts_per_step=PER_STEP, samples_per_prompt=2),
        checkpoint=CheckpointConfig(keep=2),
    )


class Life:
    """One life of a run, from a saved state or from the beginning."""

    def __init__(
        self, folder: Path, saved: str = "", *, is_changed: bool = False, **rollout: object
    ) -> None:
        self.config = make_config(folder, **rollout)
        self.pool = FakePool()
        self.state: LoopState = initial_state(ConstraintConfig())
        if saved:
            self.state.load_state_dict(json.loads(saved))
        self.publish(self.state.step)
        self.source: BufferedSource = ahead_source(
            lambda start, count: [make_prompt(start + number) for number in range(count)],
            SingleTurn(str),
            self.pool,
            self._score,
            state=self.state,
            config=self.config,
            parallel=FakeParallel(),
            time=lambda _: contextlib.nullcontext(),
            is_changed=is_changed,
        )
        self.used: list[int] = []

    def _score(self, groups: Sequence[RolloutGroup]) -> list[tuple[Score, ...]]:
        return [make_scores(*[1.0] * len(group.rollouts)) for group in groups]

    def publish(self, version: int) -> None:
        self.pool.weight_version = self.state.published_version = version

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            step = next(self.state.steps(self.config.loop.num_steps))
            request = RolloutRequest(
                step=step, first_prompt=0, num_prompts=PER_STEP, weight_version=step - 1
            )
            self.used += [each.group.prompt.index for each in self.source.take(request).groups]
            self.publish(step)

    def wait_for(self, num_finished: int) -> None:
        deadline = time.monotonic() + DEADLINE
        while len(self.source.finished()) < num_finished:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def save(self) -> str:
        save_ahead(self.source, self.state, self.config, FakeParallel())
        return json.dumps(self.state.state_dict())

    def sampled(self) -> list[int]:
        return [each.key for each in self.pool.requests]


def test_a_resumed_run_uses_every_prompt_once_and_keeps_finished_groups(tmp_path: Path) -> None:
    first = Life(tmp_path)
    with first.source:
        first.train(2)
        first.wait_for(3 * PER_STEP)  # for steps 3, 4 and 5
        saved = first.save()
        first.train(1)  # is lost with the process
    assert has_step(tmp_path / AHEAD, 2)
    second = Life(tmp_path, saved)
    assert second.state.next_prompt == 2 * PER_STEP
    with second.source:
        second.train(4)
    assert second.used == list(range(6, 18))
    # Those of steps 3 to 5 come from the checkpoint, and are the same.
    assert min(second.sampled()) == 5 * PER_STEP


def test_changed_settings_have_finished_groups_sampled_again(tmp_path: Path) -> None:
    first = Life(tmp_path)
    with first.source:
        first.train(1)
        first.wait_for(3)
        saved = first.save()
    second = Life(tmp_path, saved, is_changed=True)
    with second.source:
        second.train(1)
    assert min(second.sampled()) == PER_STEP


def test_a_checkpoint_knows_prompts_that_were_used_ahead_of_others(tmp_path: Path) -> None:
    held: set[int] = {1, 4}

    class Slow(FakePool):
        async def generate(self, request):
            if request.key in held:
                await asyncio.sleep(60)
            return await super().generate(request)

    life = Life(tmp_path, hand_out="finished")
    life.source._pool = life.pool = Slow()
    with life.source:
        life.train(1)
        saved = life.save()
    assert json.loads(saved)["next_prompt"] == 1
    assert json.loads(saved)["used_ahead"] == life.used[1:]
    held.clear()
    resumed = Life(tmp_path, saved, hand_out="finished")
    with resumed.source:
        resumed.train(3)
        resumed.save()
    used = life.used + resumed.used
    assert len(used) == len(set(used)) == 4 * PER_STEP
    assert {1, 4} < set(used)

    state = initial_state(ConstraintConfig())
    state.load_state_dict(json.loads(saved))
    with pytest.raises(ConfigError, match=r"rollout.max_policy_age: expected above 0"):
        check_ledger(state, make_config(tmp_path, max_policy_age=0))


def test_long_responses_are_sampled_in_pieces(tmp_path: Path) -> None:
    life = Life(tmp_path, tokens_per_request=2)
    with life.source:
        life.train(1)
    assert {each.sampling.max_tokens for each in life.pool.requests} == {2}
