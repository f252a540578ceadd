"""Tries the data's expected answers as responses, once at the start of a run: a verifier that does
not accept them can never give the full reward.

It runs on the first rank while the engines load, in the scorer's processes, with bounded numbers
and time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from megatron_rl.config import RewardTerm
from megatron_rl.records import Prompt
from megatron_rl.reward.expected import READERS

MAX_ANSWERS = 1000  # of each task
_MAX_SECONDS = 10.0  # after which no further batch is tried
_FIRST_BATCH = 4  # answers; a verifier that hangs costs few time limits


def try_expected_answers(
    expected: Sequence[tuple[str, Prompt]],
    verifiers: Mapping[str, Sequence[RewardTerm]],
    rejections: Callable[[Sequence[Prompt]], Sequence[str | None]],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """For each source a line that tells the share of answers that are not accepted, and where the
    first of them is.

    Args:
        expected: prompts, each with the place that it comes from.
        verifiers: by source; the first one of a source judges.
        rejections: why each of several answers is not accepted, or None (`Scorer.rejections`).
    """
    end = clock() + _MAX_SECONDS
    lines = []
    for source, terms in verifiers.items():
        # The scorer of a reasoning-gym task, or a user's own, may need no answer.
        needs_answer = terms[0].verifier in READERS
        own = [
            (where, prompt)
            for where, prompt in expected
            if prompt.source == source and (prompt.answer or needs_answer)
        ]
        reasons: list[str | None] = []
        while len(reasons) < len(own) and clock() < end:
            batch = own[len(reasons) :][: len(reasons) + _FIRST_BATCH]
            reasons += rejections([prompt for _, prompt in batch])
        if reasons:
            lines.append(_line(source, terms[0].verifier, own, reasons))
    return lines


def _line(
    source: str,
    verifier: str,
    expected: Sequence[tuple[str, Prompt]],
    reasons: Sequence[str | None],
) -> str:
    rejected = [each for each in zip(expected, reasons) if each[1] is not None]
    tried = f"{source}: of {len(reasons):,} expected answers, tried as responses, {verifier}"
    if not rejected:
        return f"{tried} accepts all"
    (where, prompt), reason = rejected[0]
    answer = prompt.answer if len(prompt.answer) <= 60 else f"{prompt.answer[:57]}..."
    share = len(rejected) / len(reasons)
    return (
        f"{tried} does not accept {len(rejected):,} ({share:.1%}); the first is {answer!r} "
        f"({where}): {reason}"
    )
