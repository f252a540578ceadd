"""The lines for a user whose figures do not move."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.config import Config, RewardConfig
from megatron_rl.observe.hints import NUM_STEPS, Hints, evaluation_hints
from megatron_rl.observe.recorder import Recorder

RUN = Path("runs/mine")


def step_of(
    *, signal: float = 0.0, reward: float = 0.0, formatted: float = 0.5, cut: float = 0.0
) -> dict[str, float | None]:
    return {
        "reward/groups_with_signal/mean": signal,
        "reward/mean": reward,
        "reward/format_rate/mean": formatted,
        "rollout/truncation_rate/mean": cut,
        "rollout/num_prompts": 4.0,
        "advantage/abs/mean": 0.0,
    }


def told_by(*steps: dict[str, float | None], config: Config | None = None) -> list[str | None]:
    hints = Hints(config or Config(), RUN)
    return [hints.add(each) for each in steps]


def test_no_group_with_a_signal_is_told_once_after_five_steps() -> None:
    *before, line = told_by(*[step_of(reward=0.0)] * NUM_STEPS)
    assert before == [None] * (NUM_STEPS - 1)
    assert line is not None and "\n" not in line
    for part in (
        "hint: 0 of 20 groups of the last 5 steps had a signal",
        "mean reward 0, 0.5 of the responses with an answer",
        "too hard",
        "data.tasks[].verifier",
        "data.tasks[].template",
        "loop.samples_per_prompt=8",
        "at no learning rate",
        "python tools/inspect_rollouts.py runs/mine",
    ):
        assert part in line
    assert [line is not None for line in told_by(*[step_of()] * 40)].count(True) == 1


@pytest.mark.parametrize("signs", [{}, {"formatted": 0.0}])
def test_a_constraint_that_acts_alone_is_named(signs: dict[str, float]) -> None:
    for value, is_named in ((0.25, True), (0.0, False), (None, False)):
        step = step_of(**signs) | {"constraint/lambda": value}
        line = told_by(*[step] * NUM_STEPS)[-1]
        assert line is not None and ("a lambda of 0.25, acts without one" in line) is is_named


def test_prompts_that_all_are_solved_are_too_easy() -> None:
    line = told_by(*[step_of(reward=1.0)] * NUM_STEPS)[-1]
    assert line is not None and "mean reward 1," in line and "too easy" in line


@pytest.mark.parametrize(
    ("signs", "beginning"),
    [
        ({"formatted": 0.0}, "hint: the verifiers found an answer in no response of the last 5"),
        ({"cut": 1.0}, "hint: every response of the last 5 steps (20 prompts) was cut at rollout."),
        ({"cut": 1.0, "signal": 0.25}, "hint: every response of the last 5 steps (20 prompts)"),
        ({"formatted": 0.0, "cut": 1.0}, "hint: every response"),
    ],
)
def test_the_most_specific_sign_is_told(signs: dict[str, float], beginning: str) -> None:
    lines = [line for line in told_by(*[step_of(**signs)] * 20) if line]
    assert len(lines) == 1 and lines[0].startswith(beginning) and "\n" not in lines[0]


def test_a_sign_that_remains_when_a_more_specific_one_has_gone() -> None:
    lines = told_by(*[step_of(formatted=0.0)] * 6, step_of())
    assert [line is not None for line in lines] == [False] * 4 + [True, False, True]
    assert lines[-1] is not None and "0 of 28 groups of the last 7 steps" in lines[-1]


@pytest.mark.parametrize(
    "other",
    [
        step_of(signal=0.25),  # a group in the middle that teaches
        step_of(signal=0.25, formatted=0.0),  # rewards without answers: a verifier of the user's
    ],
)
def test_a_signal_in_between_begins_the_count_anew(other: dict[str, float | None]) -> None:
    steps = [*[step_of(formatted=0.0)] * 4, other] * 4
    assert told_by(*steps) == [None] * len(steps)


def test_the_line_of_an_evaluation_before_the_first_step_is_no_step() -> None:
    evaluation: dict[str, float | None] = {"eval/avg_at_8": 0.5, "sync/probe_gap/mean": 0.0}
    lines = told_by(*[evaluation] * 9, *[step_of(), evaluation] * 4, step_of())
    assert [line is not None for line in lines] == [False] * (len(lines) - 1) + [True]


def test_a_group_verifier_teaches_without_a_signal_of_the_verifiers() -> None:
    config = replace(Config(), reward=RewardConfig(group_verifier="own.module:function"))
    steps = [step_of() | {"advantage/abs/mean": 0.8}] * 9
    assert told_by(*steps, config=config) == [None] * 9
    assert any(told_by(*[step_of()] * 9, config=config))
    assert any(told_by(*steps))  # an over-long penalty alone: nothing of the task is learned


def test_a_resumed_run_counts_on_and_does_not_repeat() -> None:
    steps = [step_of()] * 9
    for num_before in range(10):
        hints = Hints(Config(), RUN, steps[:num_before])
        told = [hints.add(each) is not None for each in steps[num_before:]]
        assert told == [False, False, False, False, True, False, False, False, False][num_before:]


def test_a_figure_that_is_no_number() -> None:
    line = told_by(*[step_of() | {"reward/mean": None}] * NUM_STEPS)[-1]
    assert line is not None and "mean reward unknown" in line


def run_steps(run_dir: Path, steps: range, metrics: dict[str, float]) -> list[str]:
    stream = io.StringIO()
    with Recorder(
        run_dir,
        rank=0,
        num_steps=9,
        last_step=steps.start - 1,
        console=Console(file=stream, soft_wrap=True),
        config=Config(),
    ) as recorder:
        for step in steps:
            recorder.write(step, metrics)
    return [line for line in stream.getvalue().splitlines() if line.startswith("hint: ")]


def test_the_recorder_tells_it_after_the_line_of_the_step(tmp_path: Path) -> None:
    metrics = {key: value or 0.0 for key, value in step_of().items()}
    assert run_steps(tmp_path, range(4), metrics) == []
    [line] = run_steps(tmp_path, range(4, 9), metrics)
    assert line.endswith(f"inspect_rollouts.py {tmp_path}")
    assert run_steps(tmp_path, range(9, 12), metrics) == []


def figures(prefix: str, **rates: float) -> dict[str, float | None]:
    own = {"failure_rate": 0.0, "format_rate": 0.5, "truncation_rate": 0.0} | rates
    return {f"{prefix}{name}/mean": value for name, value in own.items()}


def test_a_set_all_of_whose_responses_failed_alike_is_one_line_at_each_evaluation() -> None:
    """Of one that could not be scored there is no avg@k, nor any rate of the scored ones."""
    crashed: dict[str, float | None] = {
        "eval/a/failure_rate/mean": 1.0,
        "eval/a/truncation_rate/mean": 0.0,
    }
    metrics = (
        crashed
        | figures("eval/b/", truncation_rate=1.0, format_rate=0.0)
        | figures("eval/c/", format_rate=0.0)
        | figures("eval/sound/", format_rate=0.01, truncation_rate=0.99, failure_rate=0.99)
        | figures("eval/", format_rate=0.0)
    )
    of_a, of_b, of_c, held_out = evaluation_hints(metrics, RUN)
    assert of_a.startswith("hint: eval a: its verifier could score none of the responses")
    assert of_b.startswith("hint: eval b: every response was cut at max_tokens")
    assert of_c.startswith("hint: eval c: the verifier found an answer in none of the responses")
    assert of_c.endswith("samples: python tools/inspect_rollouts.py runs/mine --evaluation c")
    assert held_out.startswith("hint: held-out prompts: the verifier found an answer in none")
    assert held_out.endswith("inspect_rollouts.py runs/mine --evaluation")
    assert not any("\n" in line for line in (of_a, of_b, of_c, held_out))
    assert evaluation_hints(step_of(), RUN) == []


def test_the_recorder_tells_it_at_each_evaluation(tmp_path: Path) -> None:
    metrics = {key: value or 0.0 for key, value in figures("eval/", format_rate=0.0).items()}
    assert len(run_steps(tmp_path, range(3), metrics)) == 3
