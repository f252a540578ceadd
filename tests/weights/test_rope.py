"""RoPE settings in both formats, their defaults, and what is refused or said of a scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.weights.families.family import find_family, model_types
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.rope import rope_parameters
from tests.weights.config_files import write

ORIGINAL = {"original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL


@pytest.mark.parametrize(
    ("changes", "theta", "rope_type"),
    [
        ({"rope_parameters": None}, 10000.0, "default"),
        ({"rope_parameters": None, "rope_theta": 1e6}, 1e6, "default"),
        (
            {
                "rope_parameters": None,
                "rope_theta": 5e5,
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            5e5,
            "linear",
        ),
        (
            {
                "rope_parameters": None,
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0} | ORIGINAL,
            },
            5e5,
            "llama3",
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": 1e4}},
            1e4,
            "yarn",
        ),
    ],
)
def test_rope_settings_of_old_and_new_form(
    tmp_path: Path, changes: dict[str, Any], theta: float, rope_type: str
) -> None:
    geometry = read_geometry(write(tmp_path, **changes))
    assert (geometry.rope_theta, geometry.has_rope_scaling) == (theta, rope_type != "default")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert rope_parameters(raw)["rope_type"] == rope_type


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 512),
        ({"rope_parameters": YARN}, 2048),  # as Qwen documents it: 4 x 512
        ({"rope_parameters": YARN, "max_position_embeddings": 2048}, 2048),
        ({"rope_parameters": YARN, "max_position_embeddings": 600}, 2048),
        (
            {"rope_parameters": None, "rope_scaling": YARN | {"rope_type": "", "type": "yarn"}},
            2048,
        ),
        ({"rope_parameters": YARN, "max_position_embeddings": 4096}, 4096),
        # transformers takes the original length from here, too
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}} | ORIGINAL, 2048),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 512),
    ],
)
def test_yarn_extends_the_original_length(
    tmp_path: Path, changes: dict[str, Any], positions: int
) -> None:
    assert read_geometry(write(tmp_path, **changes)).max_position_embeddings == positions


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling",
        ),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": None}}, "rope_parameters"),
    ],
)
def test_yarn_without_the_original_length_says_what_to_write(
    tmp_path: Path, changes: dict[str, Any], section: str
) -> None:
    """transformers and vLLM would take max_position_embeddings for it, extended or not."""
    key = "original_max_position_embeddings"
    with pytest.raises(DataError) as caught:
        read_geometry(write(tmp_path, **changes))
    assert str(caught.value) == (
        f"{tmp_path}/config.json: expected {key} in {section} with rope_type yarn, the length that "
        f"the model was trained with before it was extended, got none: write {key}=512 there if "
        "max_position_embeddings=512 is that length (the context is then factor=4 times as long), "
        f"or {key}=128 if it is the extended one"
    )


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
@pytest.mark.parametrize("factor", [0, 0.5, "4", float("nan"), None])
def test_a_factor_that_is_none(tmp_path: Path, kind: str, factor: object) -> None:
    folder = write(tmp_path, rope_parameters={"rope_type": kind, "factor": factor} | ORIGINAL)
    with pytest.raises(DataError, match=rf"a factor of at least 1 in rope_parameters .* {kind}, g"):
        read_geometry(folder)


def test_rope_by_layer_type_is_refused(tmp_path: Path) -> None:
    """It would be read as no scaling, with the family's theta."""
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(ConfigError, match=r"rope_parameters=\['full_attention'\], which the learn"):
        read_geometry(write(tmp_path, rope_parameters=nested))


@pytest.mark.parametrize("model_type", model_types())
def test_the_default_theta_is_that_of_transformers(model_type: str) -> None:
    expected = AutoConfig.for_model(model_type).rope_parameters["rope_theta"]
    rope = rope_parameters({}, find_family(model_type).default_rope_theta)
    assert rope["rope_theta"] == expected


def test_the_theta_of_the_family_is_the_model_s(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    geometry = read_geometry(write(tmp_path, model_type="mixtral", rope_parameters=None, **experts))
    assert geometry.rope_theta == 1e6


def test_llama3_without_the_original_length_says_what_to_write(tmp_path: Path) -> None:
    folder = write(tmp_path, rope_parameters={"rope_type": "llama3", "factor": 8.0})
    with pytest.raises(DataError, match=r"=512 there if max_position_embeddings=512 is that len"):
        read_geometry(folder)
