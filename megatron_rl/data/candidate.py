"""Reads a question and its answer from a record of a file or a task, before tokenization."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rl.errors import DataError

Messages = tuple[tuple[str, str], ...]  # (role, content), in order

_FINAL_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")  # as GSM8K writes it
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
    prompt_key: str = "data.tasks[].prompt_column"
    answer_key: str = "data.tasks[].answer_column"
    is_final_answer: bool = True  # whether to read "why ... #### 42" as the answer 42


def read_candidate(
    record: dict[str, Any], layout: Layout, where: str, metadata: dict[str, Any]
) -> Candidate:
    """Reads prompt and answer, and puts the template around the prompt, or around the last message
    of the user.

    Args:
        where: names the record in an error, for instance "train.jsonl, line 3".
        metadata: the candidate's metadata.

    Raises:
        DataError: a column is missing or not a text; names the nearest column.
    """
    return Candidate(
        messages=read_messages(record, layout, where),
        answer=_read_answer(record, layout, where),
        metadata=metadata,
    )


def read_messages(record: dict[str, Any], layout: Layout, where: str) -> Messages:
    """The prompt of a record as chat messages; a plain text becomes one message of the user.

    Raises:
        DataError: see `read_candidate`.
    """
    value = _lookup(record, layout.prompt_column, layout.prompt_key, where)
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_chat or not messages:
        raise DataError(
            f"{where}: expected a text or a list of chat messages in column "
            f"{layout.prompt_column!r} ({layout.prompt_key}), got {_shorten(value)}"
        )
    turns = [(message["role"], message["content"]) for message in messages]
    users = [number for number, (role, _) in enumerate(turns) if role == "user"]
    framed = users[-1] if users else len(turns) - 1
    role, content = turns[framed]
    # Not str.format: a template may contain other braces, for instance of LaTeX.
    turns[framed] = (role, layout.template.replace("{prompt}", content))
    return tuple(turns)


def _read_answer(record: dict[str, Any], layout: Layout, where: str) -> str:
    value = _lookup(record, layout.answer_column, layout.answer_key, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"{where}: expected a text or a number in column {layout.answer_column!r} "
            f"({layout.answer_key}), got {_shorten(value)}"
        )
    answer = str(value)
    if layout.is_final_answer and (final := _FINAL_ANSWER.search(answer)):
        answer = final[1]
        if _THOUSANDS.fullmatch(answer):
            answer = answer.replace(",", "")
    return answer


def _lookup(record: dict[str, Any], path: str, key: str, where: str) -> Any:
    try:
        return _find(record, path)
    except KeyError:
        names = list(_paths(record))
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.0)
        raise DataError(
            f"{where}: expected a column {path!r} ({key}), got {', '.join(names[:12])}"
            f"{', ...' if len(names) > 12 else ''} (nearest: {near[0] if near else 'none'})"
        ) from None


def _find(value: Any, path: str) -> Any:
    """The value at a dotted path, of names in dicts and numbers in lists; a name may hold dots."""
    if isinstance(value, dict) and path in value:
        return value[path]
    head, dot, rest = path.partition(".")
    if isinstance(value, list) and head.isdigit() and int(head) < len(value):
        return _find(value[int(head)], rest) if dot else value[int(head)]
    if isinstance(value, dict) and dot and head in value:
        return _find(value[head], rest)
    raise KeyError(path)


def _paths(record: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in record.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{before}{name}.")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
