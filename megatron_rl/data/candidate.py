"""Reads a question and its answer from a record of a file or a task, before tokenization."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_rl.data.readers.columns import find_value
from megatron_rl.errors import ConfigError, DataError

Messages = tuple[tuple[str, str], ...]  # (role, content), in order

SYSTEM = "system"  # the role of a system prompt

_FINAL_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")  # as GSM8K writes it
_EXACT_FLOATS = 2.0**53  # below it a float is exactly the whole number that was written
_FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z]+\*?(\{[^{}]*\})*$")  # of LaTeX, up to an argument of its own
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A question as chat messages, the expected answer, and the record it came from.

    Example: `Candidate(messages=(("user", "4 + 3 ="),), answer="7", metadata={})`.
    """

    messages: Messages
    answer: str
    metadata: dict[str, Any]  # plain JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which columns of a record hold the prompt and the answer, and the settings that name them.

    Example: DAPO-Math-17k: `Layout(prompt_column="prompt",
    answer_column="reward_model.ground_truth")`.
    """

    prompt_column: str
    answer_column: str
    template: str = "{prompt}"
    system_prompt: str = ""  # the first message of every prompt; "": those of the record, if any
    prompt_key: str = "data.tasks[].prompt_column"
    answer_key: str = "data.tasks[].answer_column"
    is_final_answer: bool = True  # whether to read "why ... #### 42" as the answer 42
    is_answer_required: bool = False  # whether an empty answer is an error


def read_candidate(
    record: dict[str, Any], layout: Layout, where: str, metadata: dict[str, Any]
) -> Candidate:
    """Reads prompt and answer, and frames the prompt (`frame`).

    Args:
        where: names the record in an error, for instance "train.jsonl, line 3".
        metadata: the candidate's metadata.

    Raises:
        DataError: a column is missing (names the nearest one) or not a text, the prompt is empty,
            or the answer is not a number or a text that can be compared.
    """
    return Candidate(
        messages=frame(read_turns(record, layout, where), layout),
        answer=read_answer(record, layout, where),
        metadata=metadata,
    )


def read_turns(record: dict[str, Any], layout: Layout, where: str) -> Messages:
    """The prompt of a record as chat messages, as they are in the record; a plain text becomes one
    message of the user.

    Raises:
        DataError: see `read_candidate`.
    """
    value = _lookup(record, layout.prompt_column, layout.prompt_key, where)
    if isinstance(value, str):
        turns: Messages = (("user", value),)
    else:
        turns = tuple(_turns_of(value))
    if not turns:
        raise DataError(
            f"{where}: expected a text or a list of chat messages in column "
            f"{layout.prompt_column!r} ({layout.prompt_key}), got {_shorten(value)}"
        )
    if not turns[_place_of_question(turns)][1].strip():
        raise DataError(
            f"{where}: expected a question in column {layout.prompt_column!r} "
            f"({layout.prompt_key}), got an empty text"
        )
    for text in (text for turn in turns for text in turn):
        _check_text(text, layout.prompt_column, layout.prompt_key, where)
    return turns


def _turns_of(value: Any) -> Iterator[tuple[str, str]]:
    """The messages of a list of objects; none if one of them is no message."""
    if isinstance(value, dict):  # how older versions of `datasets` store a list of objects
        columns = value.get("role"), value.get("content")
        if not all(isinstance(column, list) for column in columns):
            return
        value = [{"role": role, "content": content} for role, content in zip(*columns)]
    is_chat = isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )
    if is_chat:
        yield from ((message["role"], message["content"]) for message in value)


def check_template(record: dict[str, Any], layout: Layout) -> None:
    """Refuse a template with another column than the prompt in braces, which would stay as text.
    All other braces are text: those of JSON, and of LaTeX also around the name of a column, as in
    `\\boxed{answer}`.

    Args:
        record: a row.

    Raises:
        ConfigError: the template names a column of the row.
    """
    names = set(_paths(record)) - {"prompt"}
    for field in _FIELD.finditer(layout.template):
        if field[1] in names and not _COMMAND.search(layout.template[: field.start()]):
            key = f"{layout.prompt_key.rpartition('.')[0]}.template"
            raise ConfigError(
                f"{key}: expected {{prompt}} and no other column, got {field[0]}, which would stay "
                f"as text; put it into the prompt column, or write {{ {field[1]} }} for braces"
            )


def frame(turns: Messages, layout: Layout) -> Messages:
    """Puts the template around the last message of the user, or around the last message, and the
    layout's system prompt in the place of those of the record.
    """
    framed = _place_of_question(turns)
    role, content = turns[framed]
    # Not str.format: a template may contain other braces, for instance of LaTeX.
    turns = (
        *turns[:framed],
        (role, layout.template.replace("{prompt}", content)),
        *turns[framed + 1 :],
    )
    if not layout.system_prompt:
        return turns
    others = (turn for turn in turns if turn[0] != SYSTEM)
    return ((SYSTEM, layout.system_prompt), *others)


def _place_of_question(turns: Messages) -> int:
    users = [number for number, (role, _) in enumerate(turns) if role == "user"]
    return users[-1] if users else len(turns) - 1


def read_answer(record: dict[str, Any], layout: Layout, where: str) -> str:
    """The expected answer of a record.

    Raises:
        DataError: see `read_candidate`.
    """
    value = _lookup(record, layout.answer_column, layout.answer_key, where)
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    # A large int is finite and no float.
    is_finite = is_number and (isinstance(value, int) or math.isfinite(value))
    if not (isinstance(value, str) or is_finite):
        raise DataError(
            f"{where}: expected a text or a finite number in column {layout.answer_column!r} "
            f"({layout.answer_key}), got {_shorten(value)}"
        )
    # A column of whole numbers in which one was missing became one of floats.
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_FLOATS
    answer = str(int(value) if is_whole else value)
    _check_text(answer, layout.answer_column, layout.answer_key, where)
    if layout.is_answer_required and not answer.strip():
        raise DataError(
            f"{where}: expected an answer in column {layout.answer_column!r} "
            f"({layout.answer_key}), got an empty text"
        )
    if layout.is_final_answer and (final := _FINAL_ANSWER.search(answer)):
        answer = final[1]
        if _THOUSANDS.fullmatch(answer):
            answer = answer.replace(",", "")
    return answer


def _check_text(text: str, column: str, key: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: expected Unicode text in column {column!r} ({key}), got the lone surrogate "
            f"{code} at character {error.start}"
        ) from None


def _lookup(record: dict[str, Any], path: str, key: str, where: str) -> Any:
    try:
        return find_value(record, path)
    except KeyError:
        names = list(_paths(record))
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.0)
        raise DataError(
            f"{where}: expected a column {path!r} ({key}), got {', '.join(names[:12])}"
            f"{', ...' if len(names) > 12 else ''} (nearest: {near[0] if near else 'none'})"
        ) from None


def _paths(record: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in record.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{before}{name}.")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
