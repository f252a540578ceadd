"""The stream of pairs of prompt and response for the supervised warm start."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.config import Config
from megatron_rl.data.candidate import Layout
from megatron_rl.data.files import FileSource
from megatron_rl.data.mixture import derive_seed
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.tokenizer import PromptFormat
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

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._format = PromptFormat(tokenizer, config.data.chat_template)
        self._max_tokens = config.learner.tokens_per_micro_batch
        self._seed = derive_seed(config.data.seed, _WARM_START)
        limit = config.data.max_prompt_tokens or self._max_tokens
        self._stream: PromptStream | None = None
        self._file: FileSource | None = None
        if config.data.tasks:
            settings = dataclasses.replace(config.data, seed=self._seed)
            self._stream = PromptStream(settings, tokenizer, limit)
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
            prompt_key="warm_start.prompt_column",
            answer_key="warm_start.response_column",
            is_final_answer=False,
        )
        source = FileSource(config.warm_start.path, layout)
        if self._stream is not None:
            held_out = self._stream.held_out_texts
            source.keep(lambda messages, _: self._format.text(messages) not in held_out)
        return source

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
                f"{num_tokens}: raise learner.tokens_per_micro_batch, or shorten the pair"
            )
        return prompt_ids, response_ids
