"""Finds in the log of a vLLM server why the server ended.

The cause is rarely among the last lines. vLLM first logs the error of EngineCore or of a worker,
then errors of the API server that only refer to it ("see the root cause above"), one for every open
request, and at last what the interpreter says when it ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The prefix of a line of vLLM's log: "(EngineCore pid=17) ERROR 11-22 20:14:19 [core.py:133] "
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]+\] ?)?")
_ERROR = re.compile(  # of Python, of argparse, of a worker that a signal ended
    r"^(\w+\.)*\w*(Error|Exception|Interrupt)(: .+)?$|^\S+: error: .+"
    r"|^Worker proc \S+ died unexpectedly \(exit code: -\d+\).*"
)
# Of a C++ exception that nobody caught, of Python's fault handler: those are followed by a signal.
_FATAL = re.compile(r"^\s*what\(\):.+|^Fatal Python error: .+")
_REFERENCE = re.compile(  # to an error that was logged before
    r"root cause|stack trace \(above\)|^RuntimeError: Executor failed\.$"
)
# EngineCore ended without a word: of process/guard.py, of vLLM (vllm/v1/engine/core_client.py,
# `start_engine_core_monitor`, which says nothing if EngineCore told its error before).
_CORE_GONE = re.compile(
    r"^guard: the EngineCore process died|^\[shutdown\] MPClient: engine core exited unexpectedly"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What ended a server. Example: `Cause(line=213, text="RuntimeError: no memory")`."""

    line: int  # index of its line in the log
    text: str  # "" if EngineCore ended without a word


def find_cause(lines: Sequence[str], *, is_signal: bool) -> Cause | None:
    """The error in a log that ended its server; None if the log tells of none.

    Args:
        is_signal: whether a signal ended the server; then only an error that leads to one did.

    A server logs errors that do not end it, such as a refused update. An error that others refer to
    did end it, unless EngineCore was found dead before anything referred to an error, or there is
    no error before a reference: then it died without a word. Without any of these lines the last
    error ended the server.
    """
    bare = [_PREFIX.sub("", line) for line in lines]
    if is_signal:
        return _last(bare, [i for i, line in enumerate(bare) if _FATAL.match(line)])
    references = [i for i, line in enumerate(bare) if _REFERENCE.search(line)]
    gone = [i for i, line in enumerate(bare) if _CORE_GONE.match(line)]
    stop = min([*references[:1], *gone[:1]], default=len(bare))
    errors = [i for i in range(stop) if _ERROR.match(bare[i]) or _FATAL.match(bare[i])]
    if gone[:1] == [stop] or (stop < len(bare) and not errors):
        return Cause(line=(gone or references)[0], text="")
    return _last(bare, errors)


def _last(bare: Sequence[str], errors: Sequence[int]) -> Cause | None:
    if not errors:
        return None
    line = errors[-1]
    following = bare[line + 1] if line + 1 < len(bare) else ""
    # pydantic's messages continue on the next line
    continued = following.rstrip() if following.startswith("  ") else ""
    return Cause(line=line, text=bare[line].strip() + continued)


def last_words(lines: Sequence[str]) -> str:
    """The last line of a log that is not empty, without its prefix; "" if there is none."""
    said = [line for line in (_PREFIX.sub("", line).strip() for line in lines) if line]
    return said[-1] if said else ""
