"""Loads the model's tokenizer, and turns questions into the texts and tokens of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.data.candidate import Messages
from megatron_rl.errors import ConfigError, DataError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: str, vocab_size: int) -> Any:
    """The transformers tokenizer of a checkpoint folder; nothing is downloaded.

    Args:
        vocab_size: number of rows of the model's embedding (`vocab_size` of its config.json).

    Raises:
        DataError: the folder or its tokenizer is missing, or a token id is beyond the embedding.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if not path or not folder.is_dir():
        raise DataError(f"model.path: expected a checkpoint folder, got {path!r}")
    # If there is no tokenizer file, transformers makes an empty tokenizer from config.json.
    if not any((folder / name).is_file() for name in _FILES):
        raise DataError(f"{path}: expected a tokenizer ({', '.join(_FILES)}), found none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: expected a tokenizer that loads, got: {reason}") from error
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise DataError(
            f"{path}: expected token ids below the model's vocab_size {vocab_size}, got {largest} "
            f"({token!r}): the tokenizer belongs to another model"
        )
    return tokenizer


class PromptFormat:
    """Turns chat messages into text and text into tokens, with the tokenizer's chat template or
    without one.

    Args:
        chat_template: "auto", "always" or "never" (`data.chat_template`).

    Raises:
        ConfigError: the value is "always", but the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat_template == "always" and not has_template:
            raise ConfigError(
                "data.chat_template: expected a tokenizer with a chat template, got one without: "
                "set it to auto or never"
            )
        self._tokenizer = tokenizer
        self._is_chat = has_template and chat_template != "never"

    def text(self, messages: Messages) -> str:
        """The text of a prompt; without a chat template, only the contents of the messages."""
        if not self._is_chat:
            return "\n\n".join(content for _, content in messages)
        return self._tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )

    def token_ids(self, text: str) -> tuple[int, ...]:
        """[L] ids of a prompt; the tokenizer or the chat template adds a leading bos, if any."""
        ids = self._tokenizer(text, add_special_tokens=not self._is_chat).input_ids
        eos = self._tokenizer.eos_token_id
        # Some tokenizers end every text with eos, but a prompt is continued by the response.
        if not self._is_chat and len(ids) > 1 and ids[-1] == eos and not self._ends_with_eos(text):
            ids = ids[:-1]
        return tuple(ids)

    def response_ids(self, text: str) -> tuple[int, ...]:
        """[L] ids of a whole response: its tokens, then eos.

        Raises:
            DataError: the tokenizer has no eos.
        """
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError("model.path: expected a tokenizer with an eos token, got one without")
        return (*self._tokenizer(text, add_special_tokens=False).input_ids, eos)

    def _ends_with_eos(self, text: str) -> bool:
        return bool(self._tokenizer.eos_token) and text.endswith(self._tokenizer.eos_token)
