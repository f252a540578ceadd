"""The shape of a decoder, read from the `config.json` of a Hugging Face checkpoint.

`read_geometry` reads a checkpoint folder and returns a `Geometry`: the numbers from which the
learner builds its layers and `weights/rules.py` shards tensors. A model that the learner cannot
build raises ConfigError here, before anything is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.hub import how_to_fetch
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.weights.families.family import ExpertKeys, ModelFamily, find_family
from megatron_rl.weights.rope import ROPE_TYPES, check_scaling, num_positions, rope_parameters
from megatron_rl.weights.stages import Layout, PipelineParts, pipeline_parts

PADDING_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times TP


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGeometry:
    """The numbers of a mixture of experts, which takes the place of every layer's feed-forward
    layer.

    Example of Qwen3-30B-A3B: `ExpertGeometry(num_experts=128, num_chosen=8, ffn_hidden_size=768,
    shared_ffn_hidden_size=0, is_normalised=True)`.
    """

    num_experts: int
    num_chosen: int  # experts that a token is sent to
    ffn_hidden_size: int  # of one expert
    shared_ffn_hidden_size: int  # of the expert that every token is sent to, with a gate; 0: none
    # Whether the weights of a token's chosen experts are divided by their sum. They are the softmax
    # over all experts; divided, they are the softmax over the chosen ones.
    is_normalised: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The numbers and options from which the layers of a model are built.

    Example: `Geometry(model_type="qwen3", num_layers=4, hidden_size=128, ffn_hidden_size=384,
    num_heads=4, num_query_groups=2, head_dim=32, vocab_size=128, max_position_embeddings=256,
    norm_epsilon=1e-6, has_qk_norm=True, has_qkv_bias=False, is_tied=False, rope_theta=10000.0,
    has_rope_scaling=False)`.
    """

    model_type: str  # the name of a module in weights/families/
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int  # positions of the engine, see `num_positions`
    norm_epsilon: float
    has_qk_norm: bool
    has_qkv_bias: bool
    is_tied: bool
    rope_theta: float
    has_rope_scaling: bool
    experts: ExpertGeometry | None = None  # None: every layer has one feed-forward layer

    @property
    def attention_length(self) -> float:
        """The length of a sequence whose attention costs as many operations as the products with
        the weights of its layers. Per token and layer these are `2 P` for P weights that a token
        meets, and causal attention over L positions takes `2 L` for each of a head's columns.
        """
        width = self.num_heads * self.head_dim
        columns = self.ffn_hidden_size
        if self.experts:
            chosen = self.experts.num_chosen * self.experts.ffn_hidden_size
            columns = chosen + self.experts.shared_ffn_hidden_size
        projections = 2 * width + 2 * self.num_query_groups * self.head_dim
        return self.hidden_size * (projections + 3 * columns) / width

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """The vocabulary size rounded up to a multiple of 128 x TP, as in Megatron. The added
        columns are never sampled.
        """
        multiple = PADDING_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self, layout: Layout) -> None:
        """Raise ConfigError if TP does not divide the numbers of heads and columns, if TP and the
        number of key-value heads do not divide each other, if the pipeline does not divide the
        layers, or if the experts do not fit expert parallelism.
        """
        tensor = layout.tensor
        columns = self.experts.shared_ffn_hidden_size if self.experts else self.ffn_hidden_size
        for what, count in (
            ("attention heads", self.num_heads),
            ("columns of the feed-forward layer", columns),
            (
                "rows of queries, keys and values",
                (self.num_heads + 2 * self.num_query_groups) * self.head_dim,
            ),
        ):
            if count % tensor:
                raise ConfigError(
                    f"parallel.tensor={tensor} does not divide the model's {count} "
                    f"{what}: expected a "
                    f"divisor of {count}; change parallel.tensor"
                )
        groups = self.num_query_groups
        if groups % tensor and tensor % groups:
            raise ConfigError(
                f"parallel.tensor={tensor}: expected a divisor or a multiple of the model's "
                f"{groups} key-value heads; change parallel.tensor"
            )
        self._check_experts(layout)
        self.parts(layout)

    def _check_experts(self, layout: Layout) -> None:
        sizes = {"parallel.expert": layout.expert, "parallel.expert_tensor": layout.expert_tensor}
        if self.experts is None:
            for key, size in sizes.items():
                if size > 1:
                    raise ConfigError(
                        f"{key}={size}: expected 1 for a model without experts; change {key}"
                    )
            return
        if layout.tensor > 1 and not layout.sequence_parallel:
            raise ConfigError(
                "parallel.sequence_parallel: expected true for a mixture of experts with "
                f"parallel.tensor={layout.tensor}, got false; set "
                "parallel.sequence_parallel=true"
            )
        counts = (self.experts.num_experts, self.experts.ffn_hidden_size)
        for (key, size), count, what in zip(
            sizes.items(), counts, ("experts", "columns of an expert"), strict=True
        ):
            if count % size:
                raise ConfigError(
                    f"{key}={size} does not divide the model's {count} {what}: expected a "
                    f"divisor of {count}; change {key}"
                )

    def parts(self, layout: Layout) -> PipelineParts:
        """The parts of the pipeline; raises ConfigError if it does not divide the layers."""
        return pipeline_parts(layout, self.num_layers)


def read_geometry(model_path: str | Path, key: str = "model.path") -> Geometry:
    """Read `config.json` of a Hugging Face checkpoint folder.

    Raises:
        DataError: the folder or its `config.json` is missing, or the file is not JSON.
        ConfigError: the learner does not support the architecture or an option.
    """
    raw = read_hf_config(model_path, key)
    model_type = raw.get("model_type")
    try:
        family = find_family(repr(model_type) if isinstance(model_type, list) else model_type)
    except ConfigError as error:
        raise ConfigError(f"model.path={model_path}: {error} in config.json") from error
    try:
        _check_supported(raw, family, model_path)
        return _geometry(raw, family, model_path)
    except KeyError as error:
        raise DataError(f"{model_path}/config.json: expected a key {error}, got none") from error
    except TypeError as error:
        raise DataError(f"{model_path}/config.json: expected numbers, got: {error}") from error


def _geometry(raw: dict[str, Any], family: ModelFamily, model_path: str | Path) -> Geometry:
    rope = rope_parameters(raw, family.default_rope_theta)
    num_heads = raw["num_attention_heads"]
    num_query_groups = raw.get("num_key_value_heads") or num_heads
    if num_heads % num_query_groups:
        raise DataError(
            f"{model_path}/config.json: expected num_attention_heads as a multiple of "
            f"num_key_value_heads={num_query_groups}, got {num_heads}"
        )
    default_head_dim = family.default_head_dim or raw["hidden_size"] // num_heads
    return Geometry(
        model_type=family.model_type,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_heads=num_heads,
        num_query_groups=num_query_groups,
        head_dim=raw.get("head_dim") or default_head_dim,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=num_positions(raw),
        norm_epsilon=raw["rms_norm_eps"],
        has_qk_norm=family.has_qk_norm,
        has_qkv_bias=family.has_qkv_bias,
        is_tied=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=float(rope["rope_theta"]),
        has_rope_scaling=rope["rope_type"] != "default",
        experts=_experts(raw, family.experts, model_path) if family.experts else None,
    )


def _experts(raw: dict[str, Any], keys: ExpertKeys, model_path: str | Path) -> ExpertGeometry:
    num_experts = next((raw[key] for key in keys.num_experts if raw.get(key)), None)
    if num_experts is None:
        raise KeyError(keys.num_experts[0])
    num_chosen = raw["num_experts_per_tok"]
    if not 1 <= num_chosen <= num_experts:
        raise DataError(
            f"{model_path}/config.json: expected num_experts_per_tok from 1 to {num_experts}, the "
            f"number of experts, got {num_chosen}"
        )
    return ExpertGeometry(
        num_experts=num_experts,
        num_chosen=num_chosen,
        ffn_hidden_size=raw[keys.ffn],
        shared_ffn_hidden_size=raw[keys.shared_ffn] if keys.shared_ffn else 0,
        is_normalised=bool(raw.get(keys.is_normalised, False)) if keys.is_normalised else True,
    )


def read_hf_config(model_path: str | Path, key: str = "model.path") -> dict[str, Any]:
    """The contents of `config.json`; raises DataError if it is missing or malformed.

    Args:
        key: the setting that names the checkpoint, for messages.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        found = f"none at {path}{how_to_fetch(str(model_path))}" if model_path else "an empty text"
        raise DataError(
            f"{key}: expected a Hugging Face checkpoint with a config.json, got {found}"
        )
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(raw).__name__}")
    return raw


def layer_types(raw: dict[str, Any]) -> list[str]:
    """The kind of attention of each layer, as transformers derives it for Qwen: layers from
    `max_window_layers` on have a sliding window if `use_sliding_window` is set.
    """
    if raw.get("layer_types"):
        return list(raw["layer_types"])
    num_layers = raw["num_hidden_layers"]
    has_window = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    num_full = min(num_layers, raw.get("max_window_layers", 28)) if has_window else num_layers
    return ["full_attention"] * num_full + ["sliding_attention"] * (num_layers - num_full)


def _check_supported(raw: dict[str, Any], family: ModelFamily, model_path: str | Path) -> None:
    """Raise ConfigError for an option that changes the forward pass and that the learner does not
    support.
    """
    refused = {
        key: raw[key]
        for key, accepted in family.accepted.items()
        if raw.get(key) is not None and raw[key] not in accepted
    }
    rope = rope_parameters(raw)
    kinds = layer_types(raw)
    if len(kinds) != raw["num_hidden_layers"]:
        raise DataError(
            f"{model_path}/config.json: expected layer_types for each of num_hidden_layers="
            f"{raw['num_hidden_layers']} layers, got {len(kinds)}"
        )
    if set(kinds) != {"full_attention"}:
        key = "layer_types" if raw.get("layer_types") else "use_sliding_window"
        refused[key] = sorted(set(kinds)) if key == "layer_types" else True
    if rope["rope_type"] not in ROPE_TYPES:
        refused["rope_type"] = rope["rope_type"]
    by_layer_type = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if by_layer_type:
        refused["rope_parameters"] = by_layer_type
    check_scaling(raw, model_path)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refused["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for key, value in refused.items():
        raise ConfigError(
            f"model.path={model_path}: config.json has {key}={value!r}, which the learner "
            "does not build"
        )
