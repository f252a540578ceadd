"""A tool's process: `python -m megatron_rl.rollout.tool_worker PARENT_PID NAME`.

`rollout/tool_pool.py` starts it. It reads questions from standard input, one line of JSON each, and
writes an answer to each, one line of JSON, to the pipe that was its standard output:

    {"prompt", "turns"}  ->  {"reply": text or null}  or  {"error": text}

The first line of output is `{"error": null}` if the tool could be loaded; otherwise the error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.config.rules import is_import_path
from megatron_rl.process.lifetime import become_subreaper, die_with_parent
from megatron_rl.records import Prompt

Tool = Callable[[Prompt, Sequence[str]], str | None]


def main() -> None:
    """Answers questions until standard input is closed."""
    die_with_parent(parent_pid=int(sys.argv[1]))
    become_subreaper()
    # The output that a tool prints is sent to the log, so that it cannot mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        tool = load_tool(sys.argv[2])
    except (ImportError, AttributeError) as error:
        name = f"rollout.environment.name={sys.argv[2]}"
        print(json.dumps({"error": f"{name}: expected a function, got {error}"}), file=answers)
        return
    print(json.dumps({"error": None}), file=answers)
    for line in sys.stdin.buffer:
        print(json.dumps(_answer(tool, json.loads(line))), file=answers)


def load_tool(name: str) -> Tool:
    """The function `reply` of a module of `rollout/tools/`, or a user's "package.module:function".

    Raises:
        ImportError, AttributeError: there is none.
    """
    if is_import_path(name):
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)
    return importlib.import_module(f"megatron_rl.rollout.tools.{name}").reply


def _answer(tool: Tool, question: dict[str, Any]) -> dict[str, Any]:
    fields = question["prompt"]
    prompt = Prompt(**fields | {"token_ids": tuple(fields["token_ids"])})
    try:
        return {"reply": tool(prompt, tuple(question["turns"]))}
    except Exception as error:  # costs the episode; the parent names the error
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main()
