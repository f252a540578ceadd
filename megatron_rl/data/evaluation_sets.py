"""The sets of questions that a run evaluates on: the prompts held out of the training data, and the
named sets of `eval.sets`, from files or tasks.

Prompt i of a set is row i of its files, or draw i of its task. If fewer rows are asked for, they
keep their numbers, so that a question has the same sampling seeds in the whole set and in a part.
"""

from __future__ import annotations

import glob
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config import Config, EvalConfig, EvalSetConfig, SamplingConfig
from megatron_rl.data.candidate import Candidate
from megatron_rl.data.files import FileSource
from megatron_rl.data.mixture import derive_seed
from megatron_rl.data.prompts import open_source
from megatron_rl.data.tokenizer import PromptFormat
from megatron_rl.data.watch import Silence, Watch
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.records import Prompt

_DRAWS_PER_QUESTION = 100  # of a task, after which it counts as too small


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Questions, and how often and how each of them is answered.

    Example: `EvaluationSet(name="aime24", prompts=(Prompt(...), ...), num_samples=32,
    pass_at=(1, 32), sampling=SamplingConfig(temperature=0.7, max_tokens=32768))`.
    """

    name: str  # "": the prompts that are held out of the training data
    prompts: tuple[Prompt, ...]  # of all replicas together
    num_samples: int
    pass_at: tuple[int, ...]  # the k of pass@k, each at most num_samples
    sampling: SamplingConfig


def held_out_set(prompts: Sequence[Prompt], config: EvalConfig) -> EvaluationSet:
    """The prompts that are held out of the training data, as a set without a name."""
    return EvaluationSet(
        name="",
        prompts=tuple(prompts),
        num_samples=config.num_samples,
        pass_at=(config.num_samples,),
        sampling=config.sampling,
    )


def open_sets(
    config: Config,
    tokenizer: Any,
    context: int,
    watch: Watch | None = None,
    answer_checks: Mapping[str, Callable[[str], None]] | None = None,
) -> tuple[EvaluationSet, ...]:
    """The sets of `eval.sets` that are not skipped, in their order.

    Args:
        tokenizer: a transformers tokenizer.
        context: the largest number of tokens of a prompt with its response.
        watch: is told the progress of reading, and how many rows are left out.
        answer_checks: by source, a function that raises ValueError for an answer of a row that the
            source's verifiers cannot read.

    Raises:
        ConfigError, DataError: files are missing or cannot be read, a task is unknown, a prompt has
            no room in the context, or there are fewer questions than asked for.
    """
    used, checks = config.eval.used_sets(), answer_checks or {}
    _check_present(used)
    watch = watch or Silence()
    prompt_format = PromptFormat(tokenizer, config.data)
    sources = {
        key: open_source(each, config.data, watch, checks.get(each.source), f"eval.{key}")
        for key, each in used.items()
    }
    return tuple(
        EvaluationSet(
            name=each.name,
            prompts=tuple(
                _prompts(sources[key], each, f"eval.{key}", config, prompt_format, context, watch)
            ),
            num_samples=each.num_samples,
            pass_at=tuple(each.pass_at),
            sampling=each.sampling,
        )
        for key, each in used.items()
    )


def questions_of(sets: Sequence[EvaluationSet], count: int) -> list[tuple[str, Prompt]]:
    """Of each named set at most so many prompts, to try their answers, with their places."""
    return [
        (f"question {prompt.index}", prompt)
        for each in sets
        if each.name
        for prompt in each.prompts[:count]
    ]


def _check_present(sets: Mapping[str, EvalSetConfig]) -> None:
    """Raise DataError, for all sets at once, if files are missing."""
    missing = {}
    for each in sets.values():
        paths = [each.path] if isinstance(each.path, str) else each.path
        absent = [path for path in paths if path and not _is_there(path)]
        if absent:
            origin = f" (from {each.origin})" if each.origin else ""
            missing[each.name] = f"{each.name} at {', '.join(absent)}{origin}"
    if missing:
        raise DataError(
            "eval.sets: expected the files of every set, found none for "
            f"{'; '.join(missing.values())}: put them there, or leave sets out by "
            f"eval.skip=[{','.join(missing)}]"
        )


def _is_there(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path))


def _prompts(
    source: Any,
    questions: EvalSetConfig,
    key: str,
    config: Config,
    prompt_format: PromptFormat,
    context: int,
    watch: Watch,
) -> Iterator[Prompt]:
    room = context - questions.sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"{key}.sampling.max_tokens: expected below the model's context of {context}, got "
            f"{questions.sampling.max_tokens}"
        )
    num_kept = num_overlong = 0
    draw = _rows if isinstance(source, FileSource) else _draws
    for index, candidate in draw(source, questions, key, config.data.held_out_seed):
        where = f"{key}: {questions.name}, question {index}"
        text = prompt_format.text(candidate.messages, where)
        token_ids = prompt_format.token_ids(text)
        if not token_ids:
            raise DataError(f"{where}: expected at least one token, got none")
        if len(token_ids) > room:
            if config.data.overlong == "error":
                raise DataError(
                    f"{where}: expected at most {room} tokens, the context of {context} less "
                    f"{key}.sampling.max_tokens={questions.sampling.max_tokens}, got "
                    f"{len(token_ids)}: lower max_tokens, or drop such questions by "
                    "data.overlong=drop"
                )
            num_overlong += 1
            continue
        num_kept += 1
        yield Prompt(
            index=index,
            source=questions.source,
            text=text,
            token_ids=token_ids,
            answer=candidate.answer,
            metadata=candidate.metadata,
        )
    if not num_kept:
        raise DataError(
            f"{key}: {questions.name}: expected questions of at most {room} tokens, the context of "
            f"{context} less {key}.sampling.max_tokens={questions.sampling.max_tokens}, got none"
        )
    if num_overlong:
        watch.say(
            f"{questions.source}: {num_overlong:,} questions of more than {room} tokens are dropped"
            " (data.overlong=drop)"
        )


def _rows(
    source: FileSource, questions: EvalSetConfig, key: str, seed: int
) -> Iterator[tuple[int, Candidate]]:
    """All rows, or `num_rows` of them, drawn and in their order, with their numbers."""
    num_rows = questions.num_rows or len(source)
    if num_rows > len(source):
        raise DataError(
            f"{key}.num_rows: expected at most the {len(source)} rows of {questions.name}, got "
            f"{num_rows}"
        )
    drawn = np.random.default_rng(seed).permutation(len(source))[:num_rows]
    for number in sorted(drawn.tolist()):
        yield number, source.row(number)


def _draws(
    source: Any, questions: EvalSetConfig, key: str, seed: int
) -> Iterator[tuple[int, Candidate]]:
    """`num_rows` different questions of a task. They depend on the set's name, not on its place."""
    seed = derive_seed(seed, zlib.crc32(questions.source.encode()))
    seen = set()
    for position in range(_DRAWS_PER_QUESTION * questions.num_rows + 1000):
        candidate = source.candidate(seed, position)
        if candidate.messages in seen:
            continue
        yield len(seen), candidate
        seen.add(candidate.messages)
        if len(seen) == questions.num_rows:
            return
    raise DataError(
        f"{key}.num_rows: expected {questions.num_rows} different questions of "
        f"{questions.generator}, got {len(seen)}: lower it, or widen the task's options"
    )
