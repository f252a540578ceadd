"""Recorded rollouts come back exactly as they were, or with an error that names the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import DataError
from megatron_rl.records import RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout.recording import (
    read_recomputed,
    read_samples,
    read_step,
    truncate_after,
    write_recomputed,
    write_step,
)
from tests.rollout.groups import make_group, with_heads


def write(folder: Path, step: int, rank: int, indices: list[int], num_ranks: int) -> None:
    write_step(folder, step, rank, [make_group(each) for each in indices], num_ranks=num_ranks)


def scored(index: int) -> ScoredGroup:
    judged = make_group(index)
    return ScoredGroup(group=judged.group, scores=judged.scores)


def test_all_ranks_come_back_exactly_by_prompt_index(tmp_path: Path) -> None:
    write(tmp_path, 12, 0, [7, 3], 3)
    write(tmp_path, 12, 1, [], 3)
    write(tmp_path, 12, 2, [5], 3)
    assert read_step(tmp_path, 12) == [scored(index) for index in (3, 5, 7)]


def test_lines_can_be_read_by_anybody(tmp_path: Path) -> None:
    write(tmp_path, 12, 0, [7], 1)
    content = (tmp_path / "step_000012.rank0.jsonl").read_text()
    lines = [json.loads(line) for line in content.split("\n") if line]
    written = make_group(7)
    assert len(lines) == 3
    for sample, line in enumerate(lines):
        rollout = written.group.rollouts[sample]
        assert (line["step"], line["prompt_index"], line["sample_index"]) == (12, 7, sample)
        assert line["prompt"] == 'say "ü"\n' and line["answer"] == "7"
        assert line["response"] == rollout.text
        assert line["num_tokens"] == len(rollout.token_ids)
        assert "token_ids" not in line  # the values of tokens are in the other file
        assert line["engine"] == rollout.engine != ""
        assert line["reward"] == written.scores[sample].reward
        assert line["group_reward"] == written.scores[sample].group_reward != 0.0
        assert line["advantage"] == written.advantages[sample]
        assert line["metadata"] == written.group.prompt.metadata
    assert "ü" in content  # not escaped
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_000012.rank0.jsonl",
        "step_000012.rank0.safetensors",
    ]


def test_a_reward_that_is_not_finite_survives(tmp_path: Path) -> None:
    score = Score(reward=math.inf, is_formatted=True, failure=None)
    written = ScoredGroup(group=make_group(1, 1).group, scores=(score,))
    write_step(tmp_path, 0, 0, [written.without_judgement()], num_ranks=1)
    assert read_step(tmp_path, 0) == [written]


def test_recordings_of_older_versions_can_be_read(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, [7], 1)
    path = tmp_path / "step_000001.rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    for line in lines:
        del line["engine"], line["group_reward"], line["verifier_rewards"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [read] = read_step(tmp_path, 1)
    expected = scored(7)
    assert read.group == RolloutGroup(
        prompt=expected.group.prompt,
        rollouts=tuple(replace(each, engine="") for each in expected.group.rollouts),
    )
    assert read.scores == tuple(
        replace(each, group_reward=0.0, verifier_rewards=()) for each in expected.scores
    )


def test_heads_come_back_to_the_bit_and_are_in_no_line(tmp_path: Path) -> None:
    """Also of a rollout without a response token, which has none."""
    first, second = (with_heads(make_group(index), 5) for index in (3, 7))
    rollout = second.group.rollouts[1]
    length = len(rollout.token_ids)
    silent = replace(
        rollout, loss_mask=(False,) * length, weight_versions=(-1,) * length, head=None
    )
    rollouts = (second.group.rollouts[0], silent, second.group.rollouts[2])
    second = replace(second, group=replace(second.group, rollouts=rollouts))
    write_step(tmp_path, 1, 0, [second], num_ranks=3)
    write_step(tmp_path, 1, 1, [], num_ranks=3)
    write_step(tmp_path, 1, 2, [first], num_ranks=3)
    read = [each.group for each in read_step(tmp_path, 1)]
    assert read == [first.group, second.group]
    assert [each.head is None for each in read[1].rollouts] == [False, True, False]
    write_step(tmp_path / "without", 1, 0, [make_group(3)], num_ranks=1)
    with_head, without = (
        (folder / f"step_000001.rank{rank}.jsonl").read_text()
        for folder, rank in ((tmp_path, 2), (tmp_path / "without", 0))
    )
    assert with_head == without


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


def test_samples_come_back_with_the_values_of_their_tokens(tmp_path: Path) -> None:
    for rank, prompts in ((0, [7]), (1, [5])):
        write(tmp_path, 12, rank, prompts, 2)
    samples = read_samples(tmp_path, 12)
    assert [(line["prompt_index"], line["sample_index"]) for line in samples] == [
        (prompt, sample) for prompt in (5, 7) for sample in range(3)
    ]
    rollouts = [rollout for prompt in (5, 7) for rollout in make_group(prompt).group.rollouts]
    for line, rollout in zip(samples, rollouts, strict=True):
        assert line["response"] == rollout.text
        for name in ("token_ids", "loss_mask", "rollout_logprobs", "weight_versions"):
            assert line[name].tolist() == getattr(rollout, name).tolist()
