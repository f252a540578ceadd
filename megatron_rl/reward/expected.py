"""Which expected answers the verifiers of this package can read.

An expected answer that its verifier cannot read is never right. The data are checked with these
functions when they are opened, on every rank, so nothing here imports a verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from megatron_rl.config.data import RewardTerm
from megatron_rl.reward.answers import expected_answer
from megatron_rl.reward.numbers import Number, read_number

AnswerCheck = Callable[[str], None]


def expected_number(answer: str) -> Number:
    """The number that an expected answer is.

    Raises:
        ValueError: it is not one.
    """
    number = read_number(expected_answer(answer))
    if number is None:
        raise ValueError(f"expected a number, got {answer!r}")
    return number


# What the verifiers of this package read an expected answer with.
READERS: dict[str, Callable[[str], object]] = {
    "exact": expected_answer,
    "math_verify": expected_answer,
    "numeric": expected_number,
}


def answer_checks(verifiers: Mapping[str, Sequence[RewardTerm]]) -> dict[str, AnswerCheck]:
    """By source, a function that raises ValueError for an expected answer that one of the source's
    verifiers cannot read. Sources of which nothing is known, such as those of a user's own
    verifier, have none.
    """
    readers = {
        source: [READERS[term.verifier] for term in terms if term.verifier in READERS]
        for source, terms in verifiers.items()
    }
    return {source: _check(*of_source) for source, of_source in readers.items() if of_source}


def _check(*readers: Callable[[str], object]) -> AnswerCheck:
    @lru_cache(maxsize=2**16)  # many rows have the same answer
    def check(answer: str) -> None:
        for read in readers:
            read(answer)

    return check
