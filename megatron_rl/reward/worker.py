"""A scoring process: `python -m megatron_rl.reward.worker PARENT_PID MEMORY_GIB GROUP_VERIFIER
VERIFIER=KEY ...`.

`reward/pool.py` starts it; GROUP_VERIFIER is "" if there is none, and KEY is the setting that names
the verifier. More memory than MEMORY_GIB is
refused by the kernel, and raises MemoryError; 0 sets no limit. Torch is never imported. The
process reads questions from standard input, one line of JSON each, and writes an answer, one line
of JSON, to the pipe that was its standard output:

    {"verifier", "response", "answer", "metadata"}  ->  {"reward", "is_formatted", "failure"}
    {"answer", "metadata", "responses", "scores", "num_tokens"}  ->  {"group_rewards"}

The second kind of question is for the group verifier. If a verifier raises an error, the answer to
either kind is {"failure": "crash", "error": text}; the text ends with the file and the line of a
user's own code. The first line of output is `{"error": null}` if
every verifier could be loaded; otherwise the error is a text.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import resource
import sys
import traceback
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.process.lifetime import become_subreaper, die_with_parent
from megatron_rl.records import Score
from megatron_rl.reward.protocols import GroupInputs, GroupVerifier, Verifier
from megatron_rl.reward.registry import is_built_in, load_group_verifier, load_verifier

# Of the built-in verifiers, which need little. sympy would use all memory of the host for a
# response like 9**9**9 within the time limit.
MEMORY_LIMIT_BYTES = 4 * 2**30


def main() -> None:
    """Answers questions until standard input is closed."""
    parent_pid, memory_gib = int(sys.argv[1]), float(sys.argv[2])
    group_name = sys.argv[3]
    keys = dict(each.split("=", 1) for each in sys.argv[4:])
    die_with_parent(parent_pid=parent_pid)
    become_subreaper()
    # The output that a verifier prints is sent to the log, so that it cannot mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    limit = int(memory_gib * 2**30) or resource.RLIM_INFINITY
    if all(is_built_in(name) for name in (group_name, *keys)):
        limit = min(limit, MEMORY_LIMIT_BYTES) if limit > 0 else MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        verifiers = {name: load_verifier(name, key) for name, key in keys.items()}
        group_verifier = load_group_verifier(group_name) if group_name else None
    except ConfigError as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return
    print(json.dumps({"error": None}), file=answers)
    for line in sys.stdin.buffer:
        print(
            json.dumps(_answer(verifiers, group_verifier, json.loads(line), group_name)),
            file=answers,
        )


def _answer(
    verifiers: dict[str, Verifier],
    group_verifier: GroupVerifier | None,
    question: dict[str, Any],
    group_name: str,
) -> dict[str, Any]:
    name = question.pop("verifier", group_name)
    try:
        if "response" in question:
            return _judge(verifiers[name], **question)
        assert group_verifier is not None, "expected a question for a verifier of one response"
        return _judge_group(group_verifier, **question)
    except Exception as error:  # counted as a crash of the verifier; the parent logs the error
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return {"failure": "crash", "error": message + _place(error, name)}


def _place(error: Exception, name: str) -> str:
    """Where in the file of a user's own function an error came from: the innermost line, or that of
    the function, if it could not be called or returned something else. "" for other functions.
    """
    module_name, _, function_name = name.partition(":")
    module = sys.modules.get(module_name)
    path = getattr(module, "__file__", None)
    if is_built_in(name) or path is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if not lines:
        code = getattr(inspect.unwrap(getattr(module, function_name)), "__code__", None)
        lines = [getattr(code, "co_firstlineno", None)]
        path = getattr(code, "co_filename", path)
    return f" ({path}:{lines[-1]})" if lines[-1] else f" ({path})"


def _judge(
    verify: Verifier, *, response: str, answer: str, metadata: dict[str, Any]
) -> dict[str, Any]:
    score = verify(response, answer, metadata)
    reward = float(score.reward)
    if not math.isfinite(reward):
        raise ValueError(f"expected a finite reward, got {reward}")
    is_formatted = bool(score.is_formatted)
    return {"reward": reward, "is_formatted": is_formatted, "failure": score.failure}


def _score(fields: dict[str, Any]) -> Score:
    rewards = tuple((name, reward) for name, reward in fields["verifier_rewards"])
    return Score(**fields | {"verifier_rewards": rewards})


def _judge_group(
    group_rewards: GroupVerifier,
    *,
    answer: str,
    metadata: dict[str, Any],
    responses: list[str],
    scores: list[dict[str, Any]],
    num_tokens: list[int],
) -> dict[str, Any]:
    group = GroupInputs(
        answer=answer,
        metadata=metadata,
        responses=tuple(responses),
        scores=tuple(map(_score, scores)),
        num_tokens=tuple(num_tokens),
    )
    rewards = [float(reward) for reward in group_rewards(group)]
    if len(rewards) != len(responses) or not all(map(math.isfinite, rewards)):
        raise ValueError(f"expected {len(responses)} finite rewards, got {rewards}")
    return {"group_rewards": rewards}


if __name__ == "__main__":
    main()
