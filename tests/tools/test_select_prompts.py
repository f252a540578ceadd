"""On an evaluation that the recorder wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.rollout.recording import write_step
from tests.fakes.groups import judged, scored
from tools.select_prompts import main

# By prompt: the rewards of its responses; None could not be scored.
REWARDS: dict[str, tuple[float | None, ...]] = {
    "never": (0.0, 0.0, 0.0),
    "seldom": (0.0, 0.0, 1.0),
    "often": (1.0, None, 0.0, 1.0, 1.0),
    "always": (1.0, 1.0),
    "unknown": (None, None),
}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """The folder of an evaluation without a run."""
    groups = []
    for index, (text, rewards) in enumerate(REWARDS.items()):
        group = judged(scored(index, *rewards))
        prompt = replace(group.group.prompt, text=text, answer=text.upper())
        groups.append(replace(group, group=replace(group.group, prompt=prompt)))
    write_step(tmp_path / "rollouts" / "maths", 0, 0, groups, num_ranks=1)
    return tmp_path


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([], {"seldom": (1 / 3, 3), "often": (0.75, 4)}),
        (["--highest", "0.5"], {"seldom": (1 / 3, 3)}),
        (["--lowest", "0.75", "--highest", "1"], {"often": (0.75, 4), "always": (1.0, 2)}),
    ],
)
def test_prompts_with_a_mean_reward_within_the_bounds_are_kept(
    evaluation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bounds: list[str],
    expected: dict[str, tuple[float, int]],
) -> None:
    output = tmp_path / "new" / "prompts.jsonl"
    assert main([str(evaluation), "--set", "maths", "-o", str(output), *bounds]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {
        each["question"]: (each["mean_reward"], each["num_samples"]) for each in lines
    } == expected
    assert all(each["answer"] == each["question"].upper() for each in lines)
    told = capsys.readouterr().out
    assert f"{len(expected)} of 4 prompts (1 are never solved, 1 always)" in told


def test_nothing_to_keep_and_nothing_to_overwrite(
    evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "prompts.jsonl"
    words = [str(evaluation), "--set", "maths", "-o", str(output)]
    assert main([*words, "--lowest", "0.4", "--highest", "0.6"]) == 1
    assert "expected prompts with a mean reward within the bounds, got none of 4" in (
        capsys.readouterr().err
    )
    assert not output.exists()
    output.write_text("mine")
    assert main(words) == 1
    assert "--output: expected a new file" in capsys.readouterr().err
    assert output.read_text() == "mine"
