"""Steps are written beside the loop, one at a time, and only so many stay."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_rl.rollout.recording import write_step
from megatron_rl.rollout.writer import RolloutWriter
from tests.fakes.groups import judged, scored


def steps_in(folder: Path) -> set[int]:
    return {int(path.name[5:11]) for path in folder.glob("step_*")}


def test_the_oldest_steps_are_forgotten(tmp_path: Path) -> None:
    group = judged(scored(0, 1.0, 0.0), 1.0, -1.0)
    with RolloutWriter(tmp_path, keep=2) as writer:
        for step in range(1, 6):
            writer.submit(
                step, lambda folder, step=step: write_step(folder, step, 0, [group], num_ranks=1)
            )
    assert steps_in(tmp_path) == {4, 5}


def test_a_step_is_written_while_the_loop_goes_on(tmp_path: Path) -> None:
    may_end, order = threading.Event(), []

    def write_first(_: Path) -> None:
        assert may_end.wait(10)
        order.append("first")

    with RolloutWriter(tmp_path, keep=0) as writer:
        writer.submit(1, write_first)
        assert order == []  # `submit` did not wait for it
        may_end.set()
        writer.submit(2, lambda _: order.append("second"))
    assert order == ["first", "second"]


@pytest.mark.parametrize("is_last", [False, True])
def test_an_error_of_the_thread_is_raised_in_the_loop(is_last: bool, tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), RolloutWriter(tmp_path, keep=0) as writer:
        writer.submit(1, fail)
        if not is_last:
            writer.submit(2, lambda _: None)


def test_an_error_of_the_loop_is_not_replaced(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(ValueError, match="of the loop"), RolloutWriter(tmp_path, keep=0) as writer:
        writer.submit(1, fail)
        raise ValueError("of the loop")
