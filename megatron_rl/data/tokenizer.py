"""Loads the model's tokenizer, and turns questions into the texts and tokens of prompts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from megatron_rl.config.data import DataConfig
from megatron_rl.data.candidate import Messages
from megatron_rl.data.end_tokens import end_tokens
from megatron_rl.errors import ConfigError, DataError

# Arguments of apply_chat_template that are set here or do not concern the text.
_RESERVED = (
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "messages",
)
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: str, vocab_size: int) -> Any:
    """The transformers tokenizer of a checkpoint folder; nothing is downloaded. If it has no eos
    but the model's config has, it gets that one.

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
    if tokenizer.eos_token_id is None and (ends := end_tokens(path, tokenizer, vocab_size)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


class PromptFormat:
    """Turns chat messages into text and text into tokens, with the tokenizer's chat template or
    without one.

    Args:
        config: the settings `chat_template`, `chat_template_file` and `chat_template_arguments`.

    Raises:
        ConfigError: a template is needed and there is none, it is malformed, or it does not read
            one of the arguments.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if config.chat_template_file:
            template = read_template(config.chat_template_file)
        if not template and (config.chat_template == "always" or config.chat_template_arguments):
            key = "chat_template" if config.chat_template == "always" else "chat_template_arguments"
            raise ConfigError(
                f"data.{key}: expected a tokenizer with a chat template, got one without: name one "
                "by data.chat_template_file, or set data.chat_template to auto or never and "
                "data.chat_template_arguments to {}"
            )
        self._tokenizer = tokenizer
        self._is_chat = bool(template) and config.chat_template != "never"
        # Without a file, transformers chooses among the tokenizer's own.
        self._template = template if config.chat_template_file else None
        self._arguments = dict(config.chat_template_arguments)
        if self._is_chat:
            _check_template(template, self._arguments)

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is used."""
        return self._is_chat

    def text(self, messages: Messages, where: str = "data") -> str:
        """The text of a prompt; without a chat template, only the contents of the messages.

        Args:
            where: names the prompt in an error.

        Raises:
            DataError: the chat template refuses the messages.
        """
        if not self._is_chat:
            return "\n\n".join(content for _, content in messages)
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._arguments,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(role for role, _ in messages)
            raise DataError(
                f"{where}: expected messages that the chat template accepts, got {roles}: "
                f"{_brief(error)}; change them, or name another template by "
                "data.chat_template_file"
            ) from error

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


def read_template(path: str) -> str:
    """The text of `data.chat_template_file`; "" if none is given.

    Raises:
        ConfigError: the file is missing, or is not UTF-8.
    """
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template_file: expected a Jinja file at {path}, got {_brief(error)}"
        ) from error


def _check_template(template: str | Mapping[str, str], arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError if a template is malformed or does not read one of the arguments, since
    Jinja would ignore that silently.

    Args:
        template: one template, or several by name.
    """
    texts = [template] if isinstance(template, str) else list(template.values())
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    known: set[str] = set()
    for text in texts:
        try:
            syntax = environment.parse(_GENERATION_TAG.sub("", text))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.chat_template_file: expected a Jinja template, got one with {error.message} "
                f"in line {error.lineno}"
            ) from error
        known |= jinja2.meta.find_undeclared_variables(syntax)
    for name in arguments:
        if name in _RESERVED or name not in known:
            names = sorted(known.difference(_RESERVED))
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"data.chat_template_arguments: expected variables of the chat template, got "
                f"{name!r} (nearest: {near[0] if near else 'none'})"
            )


def _brief(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
