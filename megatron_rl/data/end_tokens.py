"""The tokens that end a response.

A checkpoint names such tokens in three places: the tokenizer's eos, `eos_token_id` of `config.json`
and that of `generation_config.json`. They often differ, and of the three vLLM reads the tokenizer's
and one of the others. Here a response ends at each of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError

CONFIG_NAMES = ("config.json", "generation_config.json")


def end_tokens(model_path: str | Path, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids at which a response ends, in ascending order; none if the checkpoint names none.

    Args:
        tokenizer: of transformers.
        vocab_size: number of rows of the model's embedding.

    Raises:
        DataError: a file is malformed, or names something else than ids of the vocabulary.
    """
    ids = {tokenizer.eos_token_id} - {None}
    for name in CONFIG_NAMES:
        ids |= _ids_in(Path(model_path) / name, vocab_size)
    return tuple(sorted(ids))


def _ids_in(path: Path, vocab_size: int) -> set[int]:
    if not path.is_file():
        return set()
    try:
        value = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: expected a JSON object, got {error}") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if type(each) is not int or not 0 <= each < vocab_size:
            raise DataError(
                f"{path}: eos_token_id: expected ids below the model's vocab_size {vocab_size}, "
                f"got {each!r}"
            )
    return set(ids)
