"""Tries the data's expected answers as responses, once at the start of a run: a verifier that does
not accept them can never give the full reward, and a function that fails on them will fail on all
responses.

It runs on the first rank while the engines load, in the scorer's processes, with bounded numbers
and time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from megatron_rl.config import RewardTerm
from megatron_rl.errors import ConfigError
from megatron_rl.records import Prompt
from megatron_rl.reward.expected import READERS
from megatron_rl.reward.registry import GROUP_VERIFIER_KEY, is_built_in

MAX_ANSWERS = 1000  # of each task
_MAX_SECONDS = 10.0  # after which no further batch is tried
_FIRST_BATCH = 4  # answers; a verifier that hangs costs few time limits
_NUM_CALLS = 4  # of each function of the user's own


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


def check_own_functions(
    expected: Sequence[tuple[str, Prompt]],
    verifiers: Mapping[str, Sequence[RewardTerm]],
    keys: Mapping[str, str],
    crashes: Callable[[Sequence[Prompt], str], Sequence[str | None]],
) -> None:
    """Call each function of the user's own on a few expected answers, with these as responses.

    Args:
        expected: prompts, each with the place that it comes from.
        verifiers: by source.
        keys: by the name of a verifier, or of a group verifier, the setting that names it.
        crashes: the error of a function on each of several prompts, or None (`Scorer.crashes`).

    Raises:
        ConfigError: a function fails on each of them.
    """
    for name, key in keys.items():
        if is_built_in(name):
            continue
        judged = {source for source, terms in verifiers.items() if name in _names(terms)}
        is_of_groups = key == GROUP_VERIFIER_KEY
        own = [prompt for _, prompt in expected if is_of_groups or prompt.source in judged]
        tried = own[:: max(1, len(own) // _NUM_CALLS)][:_NUM_CALLS]
        errors = list(crashes(tried, name)) if tried else []
        if errors and all(errors):
            wanted = "a finite number for each response" if is_of_groups else "a finite number"
            raise ConfigError(
                f"{key}: expected a function that returns {wanted}, got an error from {name} on "
                f"each of {len(errors)} expected answers, tried as responses; the first: "
                f"{errors[0]}"
            )


def _names(terms: Sequence[RewardTerm]) -> list[str]:
    return [term.verifier for term in terms]


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
