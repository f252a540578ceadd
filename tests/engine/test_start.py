"""What engines of a config are started with, without starting any."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import (
    Config,
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
    QuantizationConfig,
    RolloutConfig,
    ScoreCenteringConfig,
)
from megatron_rl.engine import start
from megatron_rl.engine.checkpoint import engine_model
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.weights.huggingface import CheckpointReader


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the last start."""
    arguments: dict[str, Any] = {}

    def start_engines(rollout: RolloutConfig, **keywords: Any) -> list:
        arguments.update(keywords, rollout=rollout)
        return []

    monkeypatch.setattr(start, "start_engines", start_engines)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return arguments


def make_config(model: Path) -> Config:
    return Config(model=ModelConfig(path=str(model)), loop=LoopConfig(seed=7))


def test_they_serve_the_learners_checkpoint_with_a_token_of_their_own(
    asked: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_checkpoint)
    start.start_engines_of(config, tmp_path)
    first = dict(asked)
    assert first["rollout"] == config.rollout
    assert first["model_path"] == str(tiny_checkpoint)
    assert first["log_dir"] == tmp_path / "logs"
    assert (first["seed"], first["update_timeout_seconds"]) == (7, config.sync.timeout_seconds)
    assert first["num_logprobs"] == 0
    centered = ObjectiveConfig(score_centering=ScoreCenteringConfig(enabled=True, num_logprobs=40))
    start.start_engines_of(replace(config, objective=centered), tmp_path)
    assert asked["num_logprobs"] == 40
    start.start_engines_of(config, tmp_path)
    assert len(first["token"]) >= 32 and asked["token"] != first["token"]


def test_a_given_token_wins_over_the_environment_and_that_over_chance(
    asked: dict[str, Any],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(tiny_checkpoint)
    monkeypatch.setenv(TOKEN_VARIABLE, "of the environment")
    start.start_engines_of(config, tmp_path)
    assert asked["token"] == "of the environment"
    start.start_engines_of(config, tmp_path, token="given", log_dir=tmp_path / "elsewhere")
    assert (asked["token"], asked["log_dir"]) == ("given", tmp_path / "elsewhere")


def test_engines_with_int8_activations_start_from_a_checkpoint_of_their_own(
    asked: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_checkpoint)
    quantization = QuantizationConfig(format="int8_w8a8")
    config = replace(config, rollout=replace(config.rollout, quantization=quantization))
    start.start_engines_of(config, tmp_path)
    folder = Path(asked["model_path"])
    assert folder.parent == tmp_path
    settings = json.loads((folder / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == "compressed-tensors"
    names = CheckpointReader(folder).names
    assert "model.layers.0.mlp.down_proj.weight_scale" in names
    assert len(names) > len(CheckpointReader(tiny_checkpoint).names)


def test_engines_under_yarn_are_told_of_the_longer_context(
    asked: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(Path(shutil.copytree(tiny_checkpoint, tmp_path / "model")))
    start.start_engines_of(config, tmp_path)
    assert asked["rollout"].extra_args == []
    path = tmp_path / "model" / "config.json"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    raw = json.loads(path.read_text()) | {"rope_parameters": yarn | {"rope_theta": 1e4}}
    path.write_text(json.dumps(raw))
    own = replace(config, rollout=replace(config.rollout, extra_args=["--seed", "3"]))
    start.start_engines_of(own, tmp_path)
    option, value, *rest = asked["rollout"].extra_args
    assert (option, json.loads(value)) == ("--hf-overrides", {"max_position_embeddings": 1024})
    assert rest == ["--seed", "3"]  # last, so that they win
    path.write_text(json.dumps(raw | {"max_position_embeddings": 1024}))
    start.start_engines_of(config, tmp_path)
    assert asked["rollout"].extra_args == []


def test_an_engine_s_own_checkpoint_has_no_copy_of_a_tied_head(
    asked: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    raw = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(raw))
    assert "lm_head.weight" in CheckpointReader(model).names
    config = make_config(model)
    quantization = QuantizationConfig(format="int8_w8a8")
    config = replace(config, rollout=replace(config.rollout, quantization=quantization))
    start.start_engines_of(config, tmp_path)
    assert "lm_head.weight" not in CheckpointReader(asked["model_path"]).names


@pytest.mark.parametrize("number", ["none", "int8", "fp8", "int4"])
def test_formats_of_weights_alone_need_no_checkpoint(
    number: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rollout = RolloutConfig(quantization=QuantizationConfig(format=number))
    assert engine_model(rollout, tiny_checkpoint, tmp_path / "engine") == str(tiny_checkpoint)
    assert not (tmp_path / "engine").exists()
