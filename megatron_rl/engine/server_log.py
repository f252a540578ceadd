"""Finds in the log of a vLLM server why the server ended.

The cause is rarely among the last lines. vLLM first logs the error of EngineCore or of a worker,
then errors of the API server that only refer to it ("see the root cause above"), one for every open
request, and at last what the interpreter says when it ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_BEFORE, SHOWN_AFTER = 5, 14  # lines of the log around the cause
# The prefix of a line of vLLM's log: "(EngineCore pid=17) ERROR 11-22 20:14:19 [core.py:133] "
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]+\] ?)?")
_ERROR = re.compile(  # of Python, of argparse
    r"^(\w+\.)*\w*(Error|Exception|Interrupt)(: .+)?$|^\S+: error: .+"
)
# Of a C++ exception that nobody caught, of Python's fault handler: those are followed by a signal.
_FATAL = re.compile(r"^\s*what\(\):.+|^Fatal Python error: .+")
_REFERENCE = re.compile(r"root cause|stack trace \(above\)")  # to an error that was logged before
_GUARD = re.compile(r"^guard: .+")  # of process/guard.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The error that ended a server. Example: `Cause(line=213, text="RuntimeError: no memory")`."""

    line: int  # index of its line in the log
    text: str


def find_cause(lines: Sequence[str], *, is_signal: bool) -> Cause | None:
    """The error in a log that ended its server; None if the log tells of none.

    Args:
        is_signal: whether a signal ended the server; then only an error that leads to one did.

    A server logs errors that do not end it, such as a refused update. An error that others refer to
    did end it; without a reference the last one did, unless the guard found EngineCore dead, which
    then died without a word, as it did if there is no error before a reference.
    """
    bare = [_PREFIX.sub("", line) for line in lines]
    if is_signal:
        return _cause(bare, [i for i, line in enumerate(bare) if _FATAL.match(line)])
    references = [i for i, line in enumerate(bare) if _REFERENCE.search(line)]
    stop = references[0] if references else len(bare)
    errors = [i for i in range(stop) if _ERROR.match(bare[i]) or _FATAL.match(bare[i])]
    if not references or not errors:
        errors = [i for i, line in enumerate(bare) if _GUARD.match(line)] or errors
    return _cause(bare, errors)


def _cause(bare: Sequence[str], errors: Sequence[int]) -> Cause | None:
    if not errors:
        return None
    line = errors[-1]
    following = bare[line + 1] if line + 1 < len(bare) else ""
    # pydantic's messages continue on the next line
    continued = following.rstrip() if following.startswith("  ") else ""
    return Cause(line=line, text=bare[line].strip() + continued)


def excerpt(lines: Sequence[str], cause: Cause | None, path: object) -> str:
    """The lines of a log around the cause, or its last ones, below a line that says which."""
    filled = [i for i, line in enumerate(lines) if line.strip()]
    if cause is None:
        shown = filled[-SHOWN_BEFORE - SHOWN_AFTER - 1 :]
        title = f"last lines of {path}:"
    else:
        here = filled.index(cause.line)
        shown = filled[max(0, here - SHOWN_BEFORE) : here + SHOWN_AFTER + 1]
        title = f"lines around it in {path}:"
    return "\n".join([title, *(lines[i] for i in shown)])
