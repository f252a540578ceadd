"""Finds the answer in a response. All verifiers of this package use this one rule.

Reasoning is not an answer: only the text behind the last `</think>` counts. Tags may be written in
capitals, and with blanks before their `>`. In the text, the answer is

1. the content of the last `<answer>...</answer>`; the end tag may be missing, since a stop string
   takes it out of the response;
2. else the content of the last `\\boxed{...}` or `\\fbox{...}`;
3. else what follows `####` in the last line, as GSM8K writes it;
4. else what follows the last "answer is", "answer:" or the like, up to the end of its sentence;
5. else the whole text.

In the first three cases the whole content is the answer, or the response has no readable answer. In
the last two a verifier of numbers or formulas also looks among words (`formulas.py`): it reads the
first formula of the sentence in case 4, the last formula of the text in case 5, or in case 4 if the
sentence has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_rl.reward.formulas import formulas_in
from megatron_rl.reward.notation import without_delimiters
from megatron_rl.reward.numbers import read_number

_THINK, _END_THINK = (re.compile(rf"<{name}\s*>", re.IGNORECASE) for name in ("think", "/think"))
_TAG, _END_TAG = (re.compile(rf"<{name}\s*>", re.IGNORECASE) for name in ("answer", "/answer"))
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_HASHES = "####"
_PHRASE = re.compile(
    r"\banswers?\b[^.:=?!\n]{0,60}?(?:\b(?:is|are|be|equals?)\b(?:\**:)?|\**[:=])\**"
    r"\s*(?=\S)(?!not\b)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.?](?=\s+[A-Z])|\n")
_MAX_SEARCHED = 20_000  # characters at the end of a text, in which a phrase or number is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer of a response.

    Example: of "So the answer is 7 apples, not 8." it is `Answer(text="7 apples, not 8",
    readings=("7", "7 apples, not 8"))`.
    """

    text: str  # the answer as a text, without white space around it; "" if there is none
    # the parts that are read as a number or a formula: the first of them that can be read counts
    readings: tuple[str, ...]


def find_answer(response: str) -> Answer:
    """The answer of a response, by the rule above."""
    said = response[_last_end(_END_THINK, response) :]
    if start := _last_end(_TAG, said):
        content = _END_TAG.split(said[start:], maxsplit=1)[0]
        boxed = _last_box(content)
        return _whole(content if boxed is None else boxed)
    boxed = _last_box(said)
    if boxed is not None:
        return _whole(boxed)
    last_line = said.rstrip().rpartition("\n")[2]
    if _HASHES in last_line:
        return _whole(last_line.rpartition(_HASHES)[2])
    end = said[-_MAX_SEARCHED:]
    phrases = list(_PHRASE.finditer(end))
    if phrases:
        content = _SENTENCE_END.split(end[phrases[-1].end() :], maxsplit=1)[0]
        text = without_delimiters(content)
        first = formulas_in(content)[:1]
        return Answer(
            text=text, readings=(*first, text) if first else (text, *formulas_in(end)[-1:])
        )
    text = said.strip()
    return Answer(text=text, readings=(*formulas_in(end)[-1:], text))


def final_answer(response: str) -> str:
    """The text of a response's answer, by the rule above; "" if there is none."""
    return find_answer(response).text


def last_number(text: str) -> Fraction | None:
    """The last number of a text, read with all that belongs to it; None if there is none."""
    for reading in (*formulas_in(text[-_MAX_SEARCHED:])[-1:], text):
        number = read_number(reading)
        if number is not None:
            return number.value
    return None


def expected_answer(answer: str) -> str:
    """What a prompt's expected answer states: its `Answer.text`. Nothing is looked for among its
    words.

    Raises:
        ValueError: it states nothing, so that no response could be right.
    """
    text = final_answer(answer)
    if not text:
        raise ValueError(f"expected an answer, got {answer!r}")
    return text


def without_unfinished_reasoning(response: str, prompt: str) -> str:
    """The response up to reasoning that it opened and did not end.

    Args:
        prompt: the text that the response continues; it may end in `<think>`.
    """
    end, opened = _last_end(_END_THINK, response), prompt.rstrip()
    if not end and _last_end(_THINK, opened) == len(opened) > 0:
        return ""
    start = _THINK.search(response, end)
    return response if start is None else response[: start.start()]


def _last_end(tag: re.Pattern[str], text: str) -> int:
    """Where the last of these tags ends; 0 if there is none."""
    return max((found.end() for found in tag.finditer(text)), default=0)


def _whole(content: str) -> Answer:
    return Answer(text=content.strip(), readings=(content.strip(),))


def _last_box(text: str) -> str | None:
    """The content of the last box; "" if the text ends inside it, None if there is no box."""
    starts = [found.end() for found in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for place in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[starts[-1] : place]
    return ""
