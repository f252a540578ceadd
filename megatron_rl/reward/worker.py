"""A scoring process: `python -m megatron_rl.reward.worker PARENT_PID VERIFIER ...`.

Started by `reward/process.py`; torch is never imported. One line of JSON comes in on standard input
for each response, `{"verifier", "response", "answer", "metadata"}`; one goes out on the pipe that
was standard output, `{"reward", "is_formatted", "failure", "error"}`. The first line out says
`{"error": null}` when every verifier could be imported, else why not.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from typing import Any

from megatron_rl.process.lifetime import die_with_parent
from megatron_rl.reward.verifiers import BUILT_IN, Verifier, load_verifier

# A response like 9**9**9 makes sympy take all memory of the host within the time limit.
MEMORY_LIMIT_BYTES = 4 * 2**30


def main() -> None:
    parent_pid, names = int(sys.argv[1]), sys.argv[2:]
    die_with_parent(parent_pid=parent_pid)
    # What a verifier prints goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if all(name in BUILT_IN for name in names):
        # A user's function may want a large address space; the built-in ones do not.
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    try:
        verifiers = {name: load_verifier(name) for name in names}
    except Exception as error:  # a user's module may raise anything; the parent tells it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"error": None}), file=answers)
    for line in sys.stdin.buffer:
        print(json.dumps(_judge(verifiers, json.loads(line))), file=answers)


def _judge(verifiers: dict[str, Verifier], request: dict[str, Any]) -> dict[str, Any]:
    verify = verifiers[request["verifier"]]
    try:
        score = verify(request["response"], request["answer"], request["metadata"])
        reward = float(score.reward)
        if not math.isfinite(reward):
            raise ValueError(f"expected a finite reward, got {reward}")
    except Exception as error:  # counted as a crash of the verifier; the parent logs what it was
        message = f"{type(error).__name__}: {error}"[:500]
        return {"reward": 0.0, "is_formatted": False, "failure": "crash", "error": message}
    return {
        "reward": reward,
        "is_formatted": bool(score.is_formatted),
        "failure": score.failure,
        "error": None,
    }


if __name__ == "__main__":
    main()
