"""What a phase that samples does when too few engines serve.

A phase calls `restore` on every rank, with the reason on a rank that has too few engines and with
"" elsewhere. It brings engines back (`loop/crew.py`, `loop/publish.py`), and returns on every rank
alike whether what is missing is to be sampled now.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from megatron_rl.errors import EngineError, EnginesLostError

Restore = Callable[[str], bool]

Answer = TypeVar("Answer")


def no_engines_to_restore(shortage: str) -> bool:
    """The `Restore` of a command without a learner: raise EngineError if there are too few."""
    if shortage:
        raise EngineError(shortage)
    return False


def ask_engines(
    ask: Callable[[], Answer], restore: Restore, timed: Callable[[], AbstractContextManager[None]]
) -> Answer | None:
    """What `ask` returns, which is called again if too few engines serve meanwhile, when they have
    been brought back. A collective over all ranks.

    Args:
        ask: may raise EnginesLostError; returns at once on ranks that have nothing to ask.
        timed: a context for each call, as opposed to the wait for engines.
    """
    while True:
        answer, shortage = None, ""
        with timed():
            try:
                answer = ask()
            except EnginesLostError as error:
                shortage = str(error)
        if not restore(shortage):
            return answer
