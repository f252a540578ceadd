"""At which tokens a response ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_rl.data.end_tokens import end_tokens
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import DataError

VOCAB = 128


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """eos is 2 in all three places."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ends_of(model: Path) -> tuple[int, ...]:
    return end_tokens(model, load_tokenizer(str(model), VOCAB), VOCAB)


def test_every_place_counts(model: Path) -> None:
    assert ends_of(model) == (2,)
    change(model / "generation_config.json", eos_token_id=[9, 2, 7])
    assert ends_of(model) == (2, 7, 9)
    change(model / "config.json", eos_token_id=5)
    assert ends_of(model) == (2, 5, 7, 9)
    (model / "generation_config.json").unlink()
    assert ends_of(model) == (2, 5)
    change(model / "config.json", eos_token_id=None)
    assert ends_of(model) == (2,)


def test_a_tokenizer_without_eos_gets_that_of_the_model(model: Path) -> None:
    """A warm start then teaches a token at which the engine stops."""
    change(model / "tokenizer_config.json", eos_token=None)
    change(model / "config.json", eos_token_id=[14, 20])
    tokenizer = load_tokenizer(str(model), VOCAB)
    assert tokenizer.eos_token_id == 2  # of generation_config.json
    assert ends_of(model) == (2, 14, 20)
    (model / "generation_config.json").unlink()
    assert load_tokenizer(str(model), VOCAB).eos_token_id == 14


@pytest.mark.parametrize("value", [128, -1, "<eos>", [2, 1e9], True])
def test_an_id_that_the_vocabulary_has_not(model: Path, value: object) -> None:
    change(model / "generation_config.json", eos_token_id=value)
    with pytest.raises(DataError, match=r"_config\.json: eos_token_id: expected ids below"):
        ends_of(model)


def test_a_malformed_generation_config(model: Path) -> None:
    for content in ("{", "[1]"):
        (model / "generation_config.json").write_text(content)
        with pytest.raises(DataError, match=r"generation_config\.json: expected a JSON object"):
            ends_of(model)
