"""What a phase that samples does when too few engines serve.

A phase calls `restore` on every rank, with the reason on a rank that has too few engines and with
"" elsewhere. It brings engines back (`loop/crew.py`, `loop/publish.py`), and returns on every rank
alike whether what is missing is to be sampled now.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rl.errors import EngineError

Restore = Callable[[str], bool]


def no_engines_to_restore(shortage: str) -> bool:
    """The `Restore` of a command without a learner: raise EngineError if there are too few."""
    if shortage:
        raise EngineError(shortage)
    return False
