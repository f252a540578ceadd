"""A question to the engines of which the last one is lost meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from megatron_rl.errors import EngineError, EnginesLostError
from megatron_rl.loop.restore import ask_engines, no_engines_to_restore


class Engines:
    """Are lost `num_losses` times before they answer 7."""

    def __init__(self, num_losses: int) -> None:
        self.num_losses = num_losses
        self.log: list[str] = []

    def ask(self) -> int:
        self.log.append("ask")
        if self.num_losses:
            self.num_losses -= 1
            raise EnginesLostError("none is left")
        return 7

    def restore(self, shortage: str) -> bool:
        self.log.append(f"restore {shortage}".strip())
        return bool(shortage)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")


@pytest.mark.parametrize("num_losses", [0, 1, 2])
def test_it_is_asked_again_when_they_are_back(num_losses: int) -> None:
    """The wait for them is not timed with the question."""
    engines = Engines(num_losses)
    assert ask_engines(engines.ask, engines.restore, engines.timed) == 7
    lost, answered = ["begin", "ask", "end", "restore none is left"], ["begin", "ask", "end"]
    assert engines.log == [*num_losses * lost, *answered, "restore"]


def test_it_is_asked_again_if_another_rank_has_too_few() -> None:
    engines, answers = Engines(0), iter([True, False])
    assert ask_engines(engines.ask, lambda shortage: next(answers), contextlib.nullcontext) == 7
    assert engines.log == ["ask", "ask"]


def test_without_a_learner_it_is_an_error() -> None:
    with pytest.raises(EngineError, match="none is left"):
        ask_engines(Engines(1).ask, no_engines_to_restore, contextlib.nullcontext)
