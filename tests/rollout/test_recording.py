"""What was sampled comes back exactly as it was, or with an error that names the file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import DataError
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score
from megatron_rl.rollout.recording import (
    read_recomputed,
    read_step,
    truncate_after,
    write_recomputed,
    write_step,
)


def group(index: int, num_samples: int = 3) -> tuple[RolloutGroup, tuple[Score, ...], list[float]]:
    chance = random.Random(index)
    prompt = Prompt(
        index=index,
        source="sum",
        text='say "ü"\n',
        token_ids=(1, 5 + index, 9),
        answer="7",
        metadata={"difficulty": {"digits": 2}, "list": [1, 2.5, None]},
    )
    rollouts = []
    for _ in range(num_samples):
        length = chance.randrange(1, 6)
        float32 = torch.tensor([-chance.random() for _ in range(length)]).tolist()
        rollouts.append(
            Rollout(
                token_ids=prompt.token_ids + tuple(chance.randrange(128) for _ in range(length)),
                loss_mask=(False,) * 3 + (True,) * length,
                rollout_logprobs=(0.0,) * 3 + tuple(float32),
                weight_versions=(-1,) * 3 + (4,) * length,
                finish_reason="length",
                text="line\u2028one\r\n日本 \ud800"[: length + 9],
            )
        )
    scores = tuple(
        Score(
            reward=chance.random(), is_formatted=sample != 1, failure="timeout" if sample else None
        )
        for sample in range(num_samples)
    )
    advantages = [chance.gauss(0, 1) for _ in range(num_samples)]
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts)), scores, advantages


def write(folder: Path, step: int, rank: int, indices: list[int], num_ranks: int) -> None:
    columns = list(zip(*[group(index) for index in indices])) or [(), (), ()]
    write_step(folder, step, rank, *columns, num_ranks=num_ranks)


def test_all_ranks_come_back_exactly_by_prompt_index(tmp_path: Path) -> None:
    write(tmp_path, 12, 0, [7, 3], 3)
    write(tmp_path, 12, 1, [], 3)
    write(tmp_path, 12, 2, [5], 3)
    groups, scores = read_step(tmp_path, 12)
    assert groups == [group(index)[0] for index in (3, 5, 7)]
    assert scores == [group(index)[1] for index in (3, 5, 7)]


def test_lines_can_be_read_by_anybody(tmp_path: Path) -> None:
    write(tmp_path, 12, 0, [7], 1)
    content = (tmp_path / "step_000012.rank0.jsonl").read_text()
    lines = [json.loads(line) for line in content.split("\n") if line]
    written, scores, advantages = group(7)
    assert len(lines) == 3
    for sample, line in enumerate(lines):
        rollout = written.rollouts[sample]
        assert (line["step"], line["prompt_index"], line["sample_index"]) == (12, 7, sample)
        assert line["prompt"] == 'say "ü"\n' and line["answer"] == "7"
        assert line["response"] == rollout.text
        assert line["rollout_logprobs"] == list(rollout.rollout_logprobs)
        assert line["weight_versions"] == list(rollout.weight_versions)
        assert line["reward"] == scores[sample].reward
        assert line["advantage"] == advantages[sample]
        assert line["metadata"] == written.prompt.metadata
    assert "ü" in content  # not escaped
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000012.rank0.jsonl",
        "step_000012.rank0.safetensors",
    ]


def test_a_reward_that_is_not_finite_survives(tmp_path: Path) -> None:
    written, _, advantages = group(1, 1)
    score = Score(reward=math.inf, is_formatted=True, failure=None)
    write_step(tmp_path, 0, 0, [written], [(score,)], [advantages], num_ranks=1)
    assert read_step(tmp_path, 0)[1] == [(score,)]


@pytest.mark.parametrize("suffix", ["jsonl", "safetensors"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str, rank: int) -> None:
    for writer in range(2):
        write(tmp_path, 3, writer, [writer], 2)
    path = tmp_path / f"step_000003.rank{rank}.{suffix}"
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        read_step(tmp_path, 3)


@pytest.mark.parametrize("suffix", ["jsonl", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    write(tmp_path, 3, 0, [1, 2], 1)
    path = tmp_path / f"step_000003.rank0.{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=path.name):
        read_step(tmp_path, 3)


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    written, scores, advantages = group(1)
    with pytest.raises(ValueError):
        write_step(tmp_path, 0, 0, [written], [scores[:2]], [advantages], num_ranks=1)
    assert list(tmp_path.iterdir()) == []


def test_recomputed_logprobs_come_back_by_sample(tmp_path: Path) -> None:
    values = torch.randn(9)
    write_recomputed(
        tmp_path,
        5,
        0,
        prompt_index=[7, 7],
        sample_index=[0, 2],
        lengths=[2, 4],
        recomputed_logprobs=values[:6],
    )
    write_recomputed(
        tmp_path,
        5,
        1,
        prompt_index=[3],
        sample_index=[1],
        lengths=[3],
        recomputed_logprobs=values[6:],
    )
    found = read_recomputed(tmp_path, 5)
    expected = {(7, 0): values[:2], (7, 2): values[2:6], (3, 1): values[6:]}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_recomputed(tmp_path, 6) == {}
    with pytest.raises(ValueError, match=r"expected \[5\], the sum of lengths, got \[9\]"):
        write_recomputed(
            tmp_path,
            5,
            0,
            prompt_index=[1],
            sample_index=[0],
            lengths=[5],
            recomputed_logprobs=values,
        )


def test_later_steps_are_truncated(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1_000_000):
        write(tmp_path, step, 0, [1], 1)
        write_recomputed(
            tmp_path,
            step,
            0,
            prompt_index=[],
            sample_index=[],
            lengths=[],
            recomputed_logprobs=torch.zeros(0),
        )
    (tmp_path / "notes.txt").write_text("mine")
    truncate_after(tmp_path, 2)
    stems = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert stems == {"step_000001", "step_000002", "notes"}
    truncate_after(tmp_path / "absent", 2)
