"""Builds one rollout from pieces of context and sampled tokens, in the order in which they come.

episode = Episode()
episode.say(prompt.token_ids)              the question
episode.sampled(completion)                the first turn, with a call of a tool
episode.say(tool_result)                   what the tool returned
episode.sampled(second_completion)         the second turn
rollout = episode.rollout(finish_reason="stop", text=text)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.engine.requests import Completion
from megatron_rl.records import Rollout, RolloutHead
from megatron_rl.rollout.heads import joined_heads


class Episode:
    """A rollout under construction. Ids, mask, log-probs and versions always have equal lengths."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._loss_mask: list[bool] = []
        self._logprobs: list[float] = []
        self._weight_versions: list[int] = []
        self._heads: list[RolloutHead] = []
        self._engine = ""
        self._routes: np.ndarray | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far, which are the input of the next `GenerateRequest`."""
        return tuple(self._token_ids)

    def say(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the policy did not choose: a prompt, a tool's result."""
        self._token_ids += token_ids
        self._loss_mask += [False] * len(token_ids)
        self._logprobs += [0.0] * len(token_ids)
        self._weight_versions += [-1] * len(token_ids)

    def sampled(self, completion: Completion) -> None:
        """Append tokens that the policy chose.

        Raises:
            ValueError: the completion does not have one log-prob and one version for each token,
                or it has a head and an earlier one has not, or the other way round.
        """
        num_tokens = len(completion.token_ids)
        for name in ("logprobs", "weight_versions"):
            if len(getattr(completion, name)) != num_tokens:
                raise ValueError(
                    f"completion.{name}: expected one for each of its {num_tokens} tokens, "
                    f"got {len(getattr(completion, name))}"
                )
        has_earlier = any(self._loss_mask)
        if has_earlier and (completion.head is None) == bool(self._heads):
            raise ValueError(
                "completion.head: expected a head with every turn of an episode or with none, got "
                f"{len(self._heads)} turns with one before a turn with{'out' * bool(self._heads)}"
            )
        if completion.head is not None:
            if len(completion.head.token_ids) != num_tokens:
                raise ValueError(
                    f"completion.head: expected one for each of its {num_tokens} tokens, got "
                    f"{len(completion.head.token_ids)}"
                )
            self._heads.append(completion.head)
        self._token_ids += completion.token_ids
        self._loss_mask += [True] * num_tokens
        self._logprobs += completion.logprobs
        self._weight_versions += completion.weight_versions
        self._engine = completion.engine
        self._routes = completion.routes  # of all tokens so far: those of the request too

    def rollout(self, *, finish_reason: str, text: str) -> Rollout:
        """The episode so far as a record; its engine is that of the last completion.

        Args:
            finish_reason: "stop" if the episode ended by itself, "length" if it was cut.
            text: the response that the verifier reads.
        """
        return Rollout(
            token_ids=self.token_ids,
            loss_mask=tuple(self._loss_mask),
            rollout_logprobs=tuple(self._logprobs),
            weight_versions=tuple(self._weight_versions),
            finish_reason=finish_reason,
            text=text,
            engine=self._engine,
            head=joined_heads(self._heads),
            routes=self._routes,
        )
