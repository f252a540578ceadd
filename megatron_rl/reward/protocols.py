"""The interfaces of a verifier of one response, and of a verifier of a whole group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.records import Score


class Verifier(Protocol):
    """Judges one response. It runs in a worker process, under a time limit."""

    def __call__(self, response: str, answer: str, metadata: dict[str, Any], /) -> Score:
        """Scores a response.

        Args:
            response: the text that the model generated.
            answer: the prompt's expected answer.
            metadata: the prompt's own record.

        Returns:
            a Score with a finite reward. A user's function may return a number in its place.

        Raises:
            Any error, which counts as a failure ("crash") and not as a wrong answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInputs:
    """The input of a group verifier: one prompt and all responses to it.

    Example: `GroupInputs(answer="7", metadata={}, responses=("7", "It is 8."), scores=(Score(
    reward=1.0, ...), Score(reward=0.0, ...)), num_tokens=(2, 5))`.
    """

    answer: str  # the prompt's expected answer
    metadata: dict[str, Any]  # the prompt's own record
    responses: tuple[str, ...]  # [G]
    scores: tuple[Score, ...]  # [G] from the verifier, including failures
    num_tokens: tuple[int, ...]  # [G] lengths of the responses


class GroupVerifier(Protocol):
    """Adds to the rewards of a group in training: for instance a reward for short responses, or for
    responses that differ. It runs in a worker process, under a time limit.
    """

    def __call__(self, group: GroupInputs, /) -> Sequence[float]:
        """The values that are added to the rewards.

        Returns:
            [G] finite numbers, one for each response.

        Raises:
            Any error; then nothing is added to the rewards of this group.
        """
        ...
