"""A tool of an environment for tests: it answers, ends its process, hangs or raises, by the number
of the prompt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from megatron_rl.records import Prompt

NUM_KINDS = 4
ANSWERS, ENDS, HANGS, RAISES = range(NUM_KINDS)
REPLY = "#ok#"


def reply(prompt: Prompt, turns: Sequence[str]) -> str | None:
    """`REPLY` to the first two turns; after that nothing."""
    kind = prompt.index % NUM_KINDS
    if kind == ENDS:
        os._exit(1)
    if kind == HANGS:
        time.sleep(600)
    if kind == RAISES:
        raise RuntimeError("a tool's own mistake")
    return REPLY if len(turns) < 3 else None
