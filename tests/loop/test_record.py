"""What a step leaves on disk, on the ranks that write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from megatron_rl.config import Config
from megatron_rl.learner.batch.packing import pack
from megatron_rl.loop.record import record_rollouts
from megatron_rl.records import RecomputedRow, SampledStep
from megatron_rl.rollout.recording import read_recomputed, read_step
from megatron_rl.rollout.writer import RolloutWriter
from tests.fakes.groups import judged, scored
from tests.fakes.learner import FakeParallel


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    assert name == "record"
    return contextlib.nullcontext()


def make_step() -> tuple[SampledStep, tuple[RecomputedRow, ...]]:
    """Two groups of two, in rows of two sequences, each position's log-prob its number."""
    groups = tuple(judged(scored(index, 1.0, 0.0), 1.0, -1.0) for index in (7, 8))
    sampled = SampledStep(groups=groups, num_prompts=2, num_rounds=1)
    rows = tuple(
        RecomputedRow(
            micro_batch=row,
            recomputed_logprobs=-torch.arange(6, dtype=torch.float32),
            is_outside_support=torch.zeros(6, dtype=torch.bool),
        )
        for row in pack(sampled.samples(), tokens_per_row=6)
    )
    return sampled, rows


def test_rollouts_and_recomputed_logprobs_come_back(tmp_path: Path) -> None:
    sampled, rows = make_step()
    config = Config(run_dir=str(tmp_path))
    with RolloutWriter(tmp_path / "rollouts", keep=0) as writer:
        record_rollouts(writer, FakeParallel(), config, phase, 3, sampled, rows)
    recorded = read_step(tmp_path / "rollouts", 3)
    assert [each.group for each in recorded] == [each.group for each in sampled.groups]
    assert [each.scores for each in recorded] == [each.scores for each in sampled.groups]
    recomputed = read_recomputed(tmp_path / "rollouts", 3)
    assert recomputed.keys() == {(7, 0), (7, 1), (8, 0), (8, 1)}
    # Three tokens a sequence, of which the first has no prediction; two sequences a row.
    assert recomputed[7, 0].tolist() == [0.0, 0.0, -1.0]
    assert recomputed[7, 1].tolist() == [0.0, -3.0, -4.0]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (FakeParallel(is_replica_head=False, is_last_stage=False), set()),
        (FakeParallel(is_last_stage=False), {"jsonl", "safetensors"}),
        (FakeParallel(is_replica_head=False), {"recomputed.safetensors"}),
        (FakeParallel(is_replica_head=False, tp_rank=1), set()),
    ],
)
def test_each_rank_writes_what_it_holds(
    parallel: FakeParallel, expected: set[str], tmp_path: Path
) -> None:
    sampled, rows = make_step()
    with RolloutWriter(tmp_path / "rollouts", keep=0) as writer:
        config = Config(run_dir=str(tmp_path))
        record_rollouts(writer, parallel, config, phase, 3, sampled, rows)
    found = {path.name.partition("rank0.")[2] for path in (tmp_path).rglob("step_*")}
    assert found == expected


def test_a_replay_records_nothing(tmp_path: Path) -> None:
    sampled, rows = make_step()
    config = Config(run_dir=str(tmp_path), replay="runs/a/rollouts")
    with RolloutWriter(tmp_path / "rollouts", keep=0) as writer:
        record_rollouts(writer, FakeParallel(), config, phase, 3, sampled, rows)
    assert list(tmp_path.iterdir()) == []
