"""Tokenizes what an environment says between two turns of the policy.

With a chat template, a reply comes as a message of the user, with everything that the template puts
between the end of the policy's turn and the beginning of its next one. The template is applied to a
short conversation once, with a mark in place of the reply; the turns themselves are never
rendered, and so never tokenized again.
"""

from __future__ import annotations

from typing import Any

from megatron_rl.config.data import DataConfig
from megatron_rl.data.tokenizer import PromptFormat
from megatron_rl.errors import ConfigError

_TURN, _REPLY = "TURN0OF0POLICY", "REPLY0OF0TOOL"


class ReplyFormat:
    """A `ReplyIds`.

    Args:
        tokenizer: a transformers tokenizer.
        config: the settings of the chat template.

    Raises:
        ConfigError: the template does not place the reply after the policy's turn.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self._tokenizer = tokenizer
        messages = [("user", "question"), ("assistant", _TURN), ("user", _REPLY)]
        form = PromptFormat(tokenizer, config)
        text = form.text(messages, "the reply of an environment") if form.is_chat else ""
        if not form.is_chat:
            text = f"{_TURN}\n{_REPLY}\n"
        _, turn, rest = text.partition(_TURN)
        before, reply, after = rest.partition(_REPLY)
        if not turn or not reply:
            raise ConfigError(
                "data.chat_template: expected a template that shows a turn of the assistant and the"
                " user's answer to it, got one that leaves one of them out; name another by "
                "data.chat_template_file, or set rollout.environment.name=single_turn"
            )
        self._before, self._after = before, after

    def __call__(self, text: str, *, after_stop_token: bool) -> tuple[int, ...]:
        """[L] ids of a reply and what is around it.

        Args:
            after_stop_token: whether the turn before it ends with the token by which the template
                ends a turn; that token is then not repeated.
        """
        ids = self._tokenizer(
            f"{self._before}{text}{self._after}", add_special_tokens=False
        ).input_ids
        if after_stop_token and ids and ids[0] in self._ends():
            ids = ids[1:]
        return tuple(ids)

    def _ends(self) -> set[int]:
        """The special tokens, one of which may end a turn."""
        return set(self._tokenizer.all_special_ids)
