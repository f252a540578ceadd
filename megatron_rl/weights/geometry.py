"""The shape of a decoder, read from a Hugging Face `config.json`.

In comes a checkpoint folder, out goes a `Geometry`: the numbers that the learner builds its layers
from and that the naming table cuts tensors by. What a model has and this learner does not build is
a ConfigError here, before anything is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, DataError

SUPPORTED_MODEL_TYPES = ("qwen3", "qwen2", "llama")
PADDING_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times TP


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the layers are built from.

    Example: `Geometry(model_type="qwen3", num_layers=4, hidden_size=128, ffn_hidden_size=384,
    num_heads=4, num_query_groups=2, head_dim=32, vocab_size=128, max_position_embeddings=256,
    norm_epsilon=1e-6, has_qk_norm=True, has_qkv_bias=False, is_tied=False, rope_theta=10000.0,
    has_rope_scaling=False)`.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    has_qk_norm: bool
    has_qkv_bias: bool
    is_tied: bool
    rope_theta: float
    has_rope_scaling: bool

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """V rounded up to a multiple of 128 x TP, as Megatron does; the columns from V on are never
        sampled.
        """
        multiple = PADDING_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self, tensor_parallel: int, pipeline_parallel: int) -> None:
        """Raise ConfigError where TP or PP do not divide what they must."""
        for what, count in (
            ("attention heads", self.num_heads),
            ("key-value heads", self.num_query_groups),
            ("columns of the feed-forward layer", self.ffn_hidden_size),
        ):
            if count % tensor_parallel:
                raise ConfigError(
                    f"parallel.tensor={tensor_parallel} does not divide the model's {count} "
                    f"{what}: expected a "
                    f"divisor of {count}; change parallel.tensor"
                )
        if self.num_layers % pipeline_parallel:
            raise ConfigError(
                f"parallel.pipeline={pipeline_parallel} does not divide the model's "
                f"{self.num_layers} layers: "
                f"expected a divisor of {self.num_layers}; change parallel.pipeline"
            )


def read_geometry(model_path: str | Path) -> Geometry:
    """Read `config.json` of a Hugging Face checkpoint folder.

    Raises:
        DataError: no folder, no `config.json`, or not JSON.
        ConfigError: an architecture or option that the learner does not build.
    """
    raw = read_hf_config(model_path)
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.path={model_path}: expected model_type one of "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}, "
            f"got {model_type!r} in config.json"
        )
    _check_supported(raw, model_path)
    try:
        return _geometry(raw)
    except KeyError as error:
        raise DataError(f"{model_path}/config.json: expected a key {error}, got none") from error


def _geometry(raw: dict[str, Any]) -> Geometry:
    rope = rope_parameters(raw)
    model_type, num_heads = raw["model_type"], raw["num_attention_heads"]
    return Geometry(
        model_type=model_type,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_heads=num_heads,
        num_query_groups=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or _default_head_dim(raw),
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        norm_epsilon=raw["rms_norm_eps"],
        has_qk_norm=model_type == "qwen3",
        has_qkv_bias=model_type == "qwen2",
        is_tied=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=float(rope["rope_theta"]),
        has_rope_scaling=rope["rope_type"] != "default",
    )


def _default_head_dim(raw: dict[str, Any]) -> int:
    """What transformers takes where config.json has none."""
    if raw["model_type"] == "qwen3":
        return 128
    return raw["hidden_size"] // raw["num_attention_heads"]


def read_hf_config(model_path: str | Path) -> dict[str, Any]:
    """The raw `config.json`; DataError where it is missing or malformed."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise DataError(
            f"model.path: expected a Hugging Face checkpoint with a config.json, got none at {path}"
        )
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(raw).__name__}")
    return raw


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """Rope settings in transformers' present form, from that form or the older `rope_scaling` and
    `rope_theta`.
    """
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    return rope


def _check_supported(raw: dict[str, Any], model_path: str | Path) -> None:
    """Options that change the forward pass and that the learner does not build."""
    rope = rope_parameters(raw)
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    found = {key: raw.get(key) for key in ("mlp_bias", "use_sliding_window", "quantization_config")}
    if raw["model_type"] != "qwen2":  # whose biases of q, k and v are always there
        found["attention_bias"] = raw.get("attention_bias")
    if raw.get("hidden_act", "silu") != "silu":
        found["hidden_act"] = raw["hidden_act"]
    if layer_types != {"full_attention"}:
        found["layer_types"] = sorted(layer_types)
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        found["rope_type"] = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for key, value in found.items():
        if value:
            raise ConfigError(
                f"model.path={model_path}: config.json has {key}={value!r}, which the learner "
                "does not build"
            )
