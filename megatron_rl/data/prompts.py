"""The stream of prompts that a run trains on, and the prompts that are held out of it.

Prompt i is a function of (data.seed, i). A run therefore needs only the next index to continue, and
a prompt depends neither on the number of ranks nor on earlier calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron_rl.config.data import DataConfig, QuestionsConfig
from megatron_rl.config.rules import is_import_path
from megatron_rl.data.candidate import Candidate, Layout
from megatron_rl.data.files import FileSource
from megatron_rl.data.mixture import Mixture, derive_seed
from megatron_rl.data.tokenizer import PromptFormat
from megatron_rl.data.watch import Silence, Watch
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.records import Prompt

_MAX_ATTEMPTS = 1000  # draws of a training prompt until one is not held out
_DRAWS_PER_HELD_OUT = 100  # draws for each held-out prompt, after which a task counts as too small


class PromptStream:
    """The prompts of a run.

    Args:
        tokenizer: a transformers tokenizer.
        max_prompt_tokens: the longest prompt; the caller resolves `data.max_prompt_tokens` = 0.
        watch: is told the progress of reading, and how many rows are left out.
        answer_checks: by source, a function that raises ValueError for an answer of a row that the
            source's verifiers cannot read.

    Raises:
        ConfigError: there is no task, a task is unknown, or it does not accept its options; see
            also `PromptFormat`.
        DataError: a row of a file cannot be read or is too long, or there are too few distinct
            prompts to hold out.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        max_prompt_tokens: int,
        watch: Watch | None = None,
        answer_checks: Mapping[str, Callable[[str], None]] | None = None,
    ) -> None:
        if not config.tasks:
            raise ConfigError("data.tasks: expected at least one task or file, got none")
        if max_prompt_tokens < 1:
            raise ConfigError(
                f"data.max_prompt_tokens: expected room for a prompt, got {max_prompt_tokens} "
                "tokens: lower rollout.sampling.max_tokens, or use a model with a longer context"
            )
        self._lock = threading.Lock()
        self._config = config
        self._format = PromptFormat(tokenizer, config)
        self._max_prompt_tokens = max_prompt_tokens
        self._watch = watch or Silence()
        checks = answer_checks or {}
        self._sources = [
            open_source(task, config, self._watch, checks.get(task.source), f"data.tasks[{number}]")
            for number, task in enumerate(config.tasks)
        ]
        weights = [task.weight for task in config.tasks]
        self._mixture = Mixture(weights, config.seed)
        self._num_overlong = [0] * len(config.tasks)  # prompts that were dropped
        self._held_out = self._draw_held_out(weights)
        self._held_out_texts = frozenset(prompt.text for prompt in self._held_out)
        for number, source in enumerate(self._sources):
            if isinstance(source, FileSource):
                self._num_overlong[number] = 0
                source.keep(partial(self._is_for_training, number))
                self._tell_overlong(number, "its rows")

    @property
    def max_prompt_tokens(self) -> int:
        """The tokens of the longest prompt that is accepted."""
        return self._max_prompt_tokens

    @property
    def held_out_texts(self) -> frozenset[str]:
        """The texts of the held-out prompts, which training must not see."""
        return self._held_out_texts

    def fingerprints(self) -> list[dict[str, Any]]:
        """For each task, plain JSON values that tell the questions it gives from others."""
        return [source.fingerprint for source in self._sources]

    def held_out(self) -> list[Prompt]:
        """The `data.num_held_out` prompts for evaluation, indices 0 to n-1, all distinct."""
        return list(self._held_out)

    def expected_answers(self, count: int) -> list[tuple[str, Prompt]]:
        """Of each task at most so many rows, or held-out questions, to try their answers: where
        they come from, and a prompt without tokens.
        """
        found = []
        for task, source in zip(self._config.tasks, self._sources, strict=True):
            if isinstance(source, FileSource):
                found += [
                    (
                        f"{where}, column {task.answer_column!r}",
                        Prompt(
                            index=index,
                            source=task.source,
                            text="",
                            token_ids=(),
                            answer=candidate.answer,
                            metadata=candidate.metadata,
                        ),
                    )
                    for index, (where, candidate) in enumerate(source.sample(count))
                ]
            else:
                own = [each for each in self._held_out if each.source == task.source][:count]
                found += [(f"held-out prompt {prompt.index}", prompt) for prompt in own]
        return found

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """The training prompts `start` to `start + count - 1`. May be called from any thread.

        Raises:
            DataError: a prompt is too long, a row lacks a column, or every question of a task is
                held out.
        """
        with self._lock:  # what is drawn first fills the caches of mixture and tasks
            return [self._prompt(index) for index in range(start, start + count)]

    def _prompt(self, index: int) -> Prompt:
        number = self._mixture.task(index)
        position = self._mixture.rank(index)
        seed = derive_seed(self._config.seed, number)
        source = self._config.tasks[number].source
        for attempt in range(_MAX_ATTEMPTS):
            candidate = self._sources[number].candidate(seed, position, attempt)
            text = self._format.text(candidate.messages, source)
            if text in self._held_out_texts:
                continue
            prompt = self._make(index, number, candidate, text)
            if prompt is not None:
                return prompt
        raise DataError(
            f"data.tasks: {source}: expected prompts besides the "
            f"{len(self._held_out)} held-out ones, got none in {_MAX_ATTEMPTS} draws: lower "
            "data.num_held_out, raise data.max_prompt_tokens, or widen the task's options"
        )

    def _is_for_training(self, number: int, candidate: Candidate, where: str) -> bool:
        text = self._format.text(candidate.messages, where)
        # In nearly all tokenizers a token covers at least one byte, so most rows need not be
        # tokenized to check their length.
        if len(text.encode()) > self._max_prompt_tokens and not self._has_room(
            number, self._format.token_ids(text), text, where
        ):
            return False
        return text not in self._held_out_texts

    def _draw_held_out(self, weights: list[float]) -> list[Prompt]:
        seed = self._config.held_out_seed
        mixture = Mixture(weights, seed)
        positions = [0] * len(self._sources)
        held_out: list[Prompt] = []
        texts: set[str] = set()
        for index in range(self._config.num_held_out):
            number = mixture.task(index)
            source = self._sources[number]
            # Every row of a file is tried once; for a task, a number of draws that should suffice.
            limit = (
                len(source)
                if isinstance(source, FileSource)
                else _DRAWS_PER_HELD_OUT * self._config.num_held_out + 1000
            )
            prompt = None
            while prompt is None:
                if positions[number] >= limit:
                    raise self._too_few(number, index, len(texts))
                candidate = source.candidate(derive_seed(seed, number), positions[number])
                positions[number] += 1
                text = self._format.text(candidate.messages, self._config.tasks[number].source)
                if text not in texts:
                    prompt = self._make(index, number, candidate, text)
            texts.add(prompt.text)
            held_out.append(prompt)
        for number, source in enumerate(self._sources):
            if not isinstance(source, FileSource):
                what = f"the {positions[number]:,} questions that were drawn to hold prompts out"
                self._tell_overlong(number, what)
        return held_out

    def _too_few(self, number: int, index: int, num_distinct: int) -> DataError:
        task, num_overlong = self._config.tasks[number], self._num_overlong[number]
        limit = f"{self._max_prompt_tokens} tokens (data.max_prompt_tokens)"
        too_long = f", {num_overlong:,} have more than {limit}" if num_overlong else ""
        return DataError(
            f"data.num_held_out: expected {self._config.num_held_out} distinct prompts, got "
            f"{num_distinct}: {task.source} has no further one{too_long}; lower it, or "
            + ("give a larger file" if task.path else "widen the task's options")
        )

    def _make(self, index: int, number: int, candidate: Candidate, text: str) -> Prompt | None:
        """The prompt; None if it is too long, and such prompts are dropped."""
        token_ids = self._format.token_ids(text)
        source = self._config.tasks[number].source
        if not self._has_room(number, token_ids, text, f"prompt {index} of {source}"):
            return None
        return Prompt(
            index=index,
            source=source,
            text=text,
            token_ids=token_ids,
            answer=candidate.answer,
            metadata=candidate.metadata,
        )

    def _has_room(self, number: int, token_ids: tuple[int, ...], text: str, what: str) -> bool:
        """Whether a prompt of a task is short enough; counts those that are not.

        Raises:
            DataError: it is not, and `data.overlong` is error; or it has no tokens.
        """
        if not token_ids:
            raise DataError(f"{what}: expected at least one token, got none")
        if len(token_ids) <= self._max_prompt_tokens:
            return True
        if self._config.overlong == "error":
            raise DataError(
                f"{what}: expected at most {self._max_prompt_tokens} tokens, got "
                f"{len(token_ids)}: drop such prompts by data.overlong=drop, or raise "
                "data.max_prompt_tokens (0: the model's context less "
                f"rollout.sampling.max_tokens). It begins {text[:60]!r}"
            )
        self._num_overlong[number] += 1
        return False

    def _tell_overlong(self, number: int, what: str) -> None:
        if self._num_overlong[number]:
            self._watch.say(
                f"{self._config.tasks[number].source}: {self._num_overlong[number]:,} of {what} "
                f"are dropped, with more than {self._max_prompt_tokens} tokens "
                "(data.max_prompt_tokens, data.overlong=drop)"
            )


def open_source(
    questions: QuestionsConfig,
    config: DataConfig,
    watch: Watch,
    check_answer: Callable[[str], None] | None = None,
    key: str = "data.tasks[]",
) -> Any:
    """The candidates of a task or of a set: a `FileSource` or a `ReasoningSource`.

    Args:
        check_answer: raises ValueError for an answer of a row that the verifiers cannot read.
        key: the setting that describes the questions, for messages.

    Raises:
        ConfigError, DataError: see `FileSource` and `ReasoningSource`.
    """
    system_prompt = (
        config.system_prompt if questions.system_prompt is None else questions.system_prompt
    )
    layout = Layout(
        prompt_column=questions.prompt_column,
        answer_column=questions.answer_column,
        template=questions.template,
        system_prompt=system_prompt,
        prompt_key=f"{key}.prompt_column",
        answer_key=f"{key}.answer_column",
        # A user's own verifier may need none.
        is_answer_required=bool(questions.path)
        and not all(is_import_path(term.verifier) for term in questions.terms),
    )
    if questions.path:
        return FileSource(
            questions.path,
            layout,
            name=questions.source,
            path_key=f"{key}.path",
            has_repeats=config.repeats == "keep",
            check_answer=check_answer,
            drops_unreadable=config.unreadable_answers == "drop",
            watch=watch,
        )
    # Imported on demand: importing reasoning-gym takes a second, and runs on files do not need it.
    from megatron_rl.data.reasoning_tasks import ReasoningSource

    return ReasoningSource(
        questions.generator,
        questions.options,
        layout,
        key=key,
        name_key=questions.generator_key,
    )
