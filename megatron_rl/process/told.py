"""What the ranks of a launch have told the user, in files that they and their agent read.

The files are in the agent's folder of this attempt: `<launch>/attempt_<n>/<local rank>/error.json`
is torch's, `<launch>/attempt_<n>/reported` is made by the first rank that fails and holds the line
that it told, and `stopped` is made by a rank that told which signal stopped the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from megatron_rl.process.folder import AGENT_VARIABLE

REPORTED, STOPPED = "reported", "stopped"


def is_first_to_fail(line: str) -> bool:
    """Whether this is the first rank of this launch on this host that fails; True without an agent.

    Args:
        line: what the agent may end with in place of its own report; "" if that report is needed.
    """
    if AGENT_VARIABLE not in os.environ:
        return True
    try:
        file = os.open(_attempt() / REPORTED, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    except OSError:
        return True  # e.g. a full disk: reporting twice is better than not at all
    with contextlib.suppress(OSError):  # without the line the agent's report is the long one
        os.write(file, line.encode(errors="replace"))
    os.close(file)
    return True


def has_failed() -> bool:
    """Whether a rank of this launch on this host has failed and told it."""
    return AGENT_VARIABLE in os.environ and (_attempt() / REPORTED).exists()


def note_stop() -> None:
    """Let the agent know that this rank tells which signal stopped the run."""
    if AGENT_VARIABLE in os.environ:
        with contextlib.suppress(OSError):  # then the agent tells it once more
            (_attempt() / STOPPED).touch()


def told_of(attempt: Path) -> str:
    """The line that the ranks of this attempt ended with; "" if the cause needs a longer report."""
    with contextlib.suppress(OSError):
        return (attempt / REPORTED).read_text(errors="replace").strip()
    return ""


def is_stop_told(attempt: Path) -> bool:
    """Whether a rank of this attempt has told which signal stopped it, or why it had failed."""
    return (attempt / STOPPED).exists() or (attempt / REPORTED).exists()


def tell_agent(message: str, *, is_first: bool) -> None:
    """Make torchrun's report end with the message instead of the advice to "enable traceback".

    The format is that of torch/distributed/elastic/multiprocessing/errors/error_handler.py.
    """
    if AGENT_VARIABLE not in os.environ:
        return
    # The agent reports the rank with the earliest timestamp, in whole seconds, as the cause.
    seconds = int(time.time()) + (0 if is_first else 1)
    extra = {"py_callstack": message, "timestamp": str(seconds)}
    with contextlib.suppress(OSError):
        Path(os.environ[AGENT_VARIABLE]).write_text(
            json.dumps({"message": {"message": message, "extraInfo": extra}})
        )


def _attempt() -> Path:
    return Path(os.environ[AGENT_VARIABLE]).parents[1]
