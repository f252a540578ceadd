"""The stream of pairs of prompt and response for the supervised warm start."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.config import Config
from megatron_rl.data.candidate import Candidate, Layout
from megatron_rl.data.files import FileSource
from megatron_rl.data.mixture import derive_seed
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.tokenizer import PromptFormat
from megatron_rl.data.watch import Silence, Watch
from megatron_rl.errors import DataError

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of the prompt, ids of the response

_WARM_START = 1  # makes its draws differ from those of the RL run with the same seed


class PairStream:
    """The pairs of a warm start, from `warm_start.path` or from the prompts and answers of
    `data.tasks`.

    Pair number i is a function of (data.seed, i). No pair has a held-out prompt of `data.tasks`. If
    `data.max_prompt_tokens` is 0, a prompt may be as long as the learner's row.

    Raises:
        ConfigError, DataError: see `PromptStream`.
    """

    def __init__(self, config: Config, tokenizer: Any, watch: Watch | None = None) -> None:
        self._format = PromptFormat(tokenizer, config.data)
        self._watch = watch or Silence()
        self._max_tokens = config.learner.tokens_per_micro_batch
        self._seed = derive_seed(config.data.seed, _WARM_START)
        limit = config.data.max_prompt_tokens or self._max_tokens
        self._stream: PromptStream | None = None
        self._file: FileSource | None = None
        if config.data.tasks:
            settings = dataclasses.replace(config.data, seed=self._seed)
            self._stream = PromptStream(settings, tokenizer, limit, self._watch)
        if config.warm_start.path or self._stream is None:
            self._file = self._open(config)

    def pairs(self, start: int, count: int) -> list[Pair]:
        """The pairs `start` to `start + count - 1`; every response ends with eos.

        Raises:
            DataError: a pair is longer than a row, or a prompt does not have exactly one answer.
        """
        return [self._pair(index) for index in range(start, start + count)]

    def _open(self, config: Config) -> FileSource:
        if not config.warm_start.path:
            raise DataError("warm_start.path: expected a file, or data.tasks to take pairs from")
        layout = Layout(
            prompt_column=config.warm_start.prompt_column,
            answer_column=config.warm_start.response_column,
            system_prompt=config.data.system_prompt,
            prompt_key="warm_start.prompt_column",
            answer_key="warm_start.response_column",
            is_final_answer=False,
        )
        source = FileSource(
            config.warm_start.path,
            layout,
            name="warm start",
            path_key="warm_start.path",
            has_repeats=config.data.repeats == "keep",
            watch=self._watch,
        )
        self._keep(source, is_dropping=config.data.overlong == "drop")
        return source

    def _keep(self, source: FileSource, *, is_dropping: bool) -> None:
        held_out = frozenset() if self._stream is None else self._stream.held_out_texts
        num_dropped = 0

        def is_kept(pair: Candidate, where: str) -> bool:
            nonlocal num_dropped
            prompt = self._format.text(pair.messages, where)
            is_long = is_dropping and self._num_tokens(prompt, pair.answer) > self._max_tokens
            num_dropped += is_long
            return not is_long and prompt not in held_out

        if held_out or is_dropping:
            source.keep(is_kept)
        if num_dropped:
            self._watch.say(
                f"warm start: {num_dropped:,} pairs are dropped, with more than "
                f"{self._max_tokens} tokens (learner.tokens_per_micro_batch, data.overlong=drop)"
            )

    def _num_tokens(self, prompt: str, response: str) -> int:
        return len(self._format.token_ids(prompt)) + len(self._format.response_ids(response))

    def _pair(self, index: int) -> Pair:
        if self._file is not None:
            candidate = self._file.candidate(self._seed, index)
            prompt_ids = self._format.token_ids(self._format.text(candidate.messages))
            response = candidate.answer
        else:
            assert self._stream is not None
            (prompt,) = self._stream.prompts(index, 1)
            prompt_ids, response = prompt.token_ids, prompt.answer
            if not response:
                raise DataError(
                    f"data.tasks: {prompt.source}: expected prompts with one answer to imitate, "
                    "got one without: give pairs by warm_start.path"
                )
        response_ids = self._format.response_ids(response)
        num_tokens = len(prompt_ids) + len(response_ids)
        if num_tokens > self._max_tokens:
            raise DataError(
                f"warm start, pair {index}: expected at most {self._max_tokens} tokens, got "
                f"{num_tokens}: raise learner.tokens_per_micro_batch, shorten the pair, or drop "
                "such pairs by data.overlong=drop"
            )
        return prompt_ids, response_ids
