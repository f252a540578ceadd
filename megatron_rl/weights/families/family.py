"""The record that describes a family of models.

Every other module of this folder defines `FAMILY`; the name of the module is the `model_type` in
`config.json`. A new family therefore needs only one file: `weights/geometry.py` reads the
options of the record, `weights/rules.py` its tensors, and no other code depends on the family.

The rows below are those of Llama's layers, whose names most families share.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from megatron_rl.config.choices import module_names
from megatron_rl.errors import ConfigError
from megatron_rl.weights import families

# How tensor parallelism shards a Megatron tensor, and how it is built from Hugging Face tensors:
#   replicated  every rank holds all       qkv      query, key and value heads by query group, cut
#   column      cut along dimension 0               by group
#   row         cut along dimension 1      gate_up  gate rows, then up rows, each cut along them
#   vocab       cut along dimension 0, after padding with zero rows to 128 x TP
Kind = Literal["replicated", "column", "row", "vocab", "qkv", "gate_up"]
# The symbolic size of a dimension: columns of the residual stream, of the feed-forward layer, of
# all query heads, of all key (or value) heads, of one head, and tokens of the vocabulary; of a
# mixture of experts the number of experts, columns of one expert and of the shared expert, and 1.
Size = Literal[
    "hidden",
    "ffn",
    "query",
    "key_value",
    "head",
    "vocab",
    "experts",
    "expert_ffn",
    "shared_ffn",
    "one",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One Megatron tensor, and the Hugging Face tensors that it consists of. In names, `{layer}`
    stands for the number of the layer and `{expert}` for that of the expert.

    Example: `TensorRow(kind="vocab", hf_names=("lm_head.weight",), hf_shapes=(("vocab",
    "hidden"),), megatron_names=("output_layer.weight",))`; `layer_row` builds the rows of a layer.
    """

    kind: Kind
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[Size, ...], ...]  # one for each name
    megatron_names: tuple[str, ...]  # the names in Megatron's layer specs

    @property
    def is_expert(self) -> bool:
        """Whether there is one such tensor for each expert; its ranks are those of expert and
        expert tensor parallelism.
        """
        return any("{expert}" in name for name in self.megatron_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKeys:
    """Where config.json of a mixture of experts has its numbers.

    Example of Mixtral: `ExpertKeys(num_experts=("num_local_experts",), ffn="intermediate_size",
    shared_ffn=None, is_normalised=None)`.
    """

    num_experts: tuple[str, ...]  # the names that releases of transformers have given it
    ffn: str  # columns of one expert
    shared_ffn: str | None  # columns of the shared expert; None: the family has none
    # whether the weights of the chosen experts are divided by their sum; None: they always are
    is_normalised: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """A family of decoders that the learner supports.

    Example: see `families/llama.py`.
    """

    model_type: str  # in config.json; the name of the family's module
    embedding: TensorRow
    layer: tuple[TensorRow, ...]  # of a decoder layer, in the order in which they are published
    final_norm: TensorRow
    head: TensorRow  # left out if the embedding is tied to it
    # Used if config.json has no head_dim; None: hidden_size / num_attention_heads.
    default_head_dim: int | None
    # Options of config.json that change the forward pass, each with the values that the learner
    # supports. An absent or null option is accepted; any other value is refused.
    accepted: Mapping[str, tuple[Any, ...]]
    experts: ExpertKeys | None = None  # None: a dense model
    default_rope_theta: float = 10000.0  # used if config.json has no rope_theta

    @property
    def has_qk_norm(self) -> bool:
        """Whether each query and key head is normalised before attention."""
        return any("self_attention.q_layernorm.weight" in name for name in self._megatron_names)

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return any("self_attention.linear_qkv.bias" in name for name in self._megatron_names)

    @property
    def _megatron_names(self) -> list[str]:
        return [name for row in self.layer for name in row.megatron_names]


def model_types() -> tuple[str, ...]:
    """The available families, by `model_type`."""
    return module_names(families.__path__, support=("family",))


@cache
def find_family(model_type: str) -> ModelFamily:
    """The record of a family.

    Raises:
        ConfigError: no module in this folder has this name, or the module describes another family.
    """
    if model_type not in model_types():
        raise ConfigError(
            f"expected model_type one of {', '.join(model_types())}, got {model_type!r}"
        )
    family = importlib.import_module(f"{families.__name__}.{model_type}").FAMILY
    if family.model_type != model_type:
        raise ConfigError(
            f"weights/families/{model_type}.py: expected the family of its name, got "
            f"{family.model_type!r}"
        )
    return family


def layer_row(kind: Kind, names: Mapping[str, tuple[Size, ...]], *megatron_names: str) -> TensorRow:
    """A row of a decoder layer.

    Args:
        names: Hugging Face names without the prefix `model.layers.{layer}.`, each with its shape.
        megatron_names: names without the prefix `decoder.layers.{layer}.`.
    """
    return TensorRow(
        kind=kind,
        hf_names=tuple("model.layers.{layer}." + name for name in names),
        hf_shapes=tuple(names.values()),
        megatron_names=tuple("decoder.layers.{layer}." + name for name in megatron_names),
    )


EMBEDDING = TensorRow(
    kind="vocab",
    hf_names=("model.embed_tokens.weight",),
    hf_shapes=(("vocab", "hidden"),),
    megatron_names=("embedding.word_embeddings.weight",),
)
# Megatron's own layers have separate norms; Transformer Engine's layers fuse a norm into the linear
# layer that follows it.
ATTENTION_NORM = layer_row(
    "replicated",
    {"input_layernorm.weight": ("hidden",)},
    "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight",
)
QKV_WEIGHT = layer_row(
    "qkv",
    {
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.k_proj.weight": ("key_value", "hidden"),
        "self_attn.v_proj.weight": ("key_value", "hidden"),
    },
    "self_attention.linear_qkv.weight",
)
QKV_BIAS = layer_row(
    "qkv",
    {
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.bias": ("key_value",),
        "self_attn.v_proj.bias": ("key_value",),
    },
    "self_attention.linear_qkv.bias",
)
QUERY_NORM = layer_row(
    "replicated", {"self_attn.q_norm.weight": ("head",)}, "self_attention.q_layernorm.weight"
)
KEY_NORM = layer_row(
    "replicated", {"self_attn.k_norm.weight": ("head",)}, "self_attention.k_layernorm.weight"
)
ATTENTION_OUTPUT = layer_row(
    "row", {"self_attn.o_proj.weight": ("hidden", "query")}, "self_attention.linear_proj.weight"
)
MLP_NORM = layer_row(
    "replicated",
    {"post_attention_layernorm.weight": ("hidden",)},
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
)
# In front of experts there is no linear layer that it could be fused into.
EXPERTS_NORM = layer_row(
    "replicated", {"post_attention_layernorm.weight": ("hidden",)}, "pre_mlp_layernorm.weight"
)
GATE_AND_UP = layer_row(
    "gate_up",
    {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    "mlp.linear_fc1.weight",
)
ROUTER = layer_row("replicated", {"mlp.gate.weight": ("experts", "hidden")}, "mlp.router.weight")
# Megatron's own experts are modules of their own; those of Transformer Engine are weights of one
# grouped product. Both number the experts of a rank.
EXPERT_GATE_AND_UP_NAMES = (
    "mlp.experts.local_experts.{expert}.linear_fc1.weight",
    "mlp.experts.linear_fc1.weight{expert}",
)
EXPERT_DOWN_NAMES = (
    "mlp.experts.local_experts.{expert}.linear_fc2.weight",
    "mlp.experts.linear_fc2.weight{expert}",
)
EXPERT_GATE_AND_UP = layer_row(
    "gate_up",
    {
        "mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
        "mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
    },
    *EXPERT_GATE_AND_UP_NAMES,
)
EXPERT_DOWN = layer_row(
    "row",
    {"mlp.experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
    *EXPERT_DOWN_NAMES,
)
DOWN = layer_row("row", {"mlp.down_proj.weight": ("hidden", "ffn")}, "mlp.linear_fc2.weight")
FINAL_NORM = TensorRow(
    kind="replicated",
    hf_names=("model.norm.weight",),
    hf_shapes=(("hidden",),),
    megatron_names=("decoder.final_layernorm.weight",),
)
HEAD = TensorRow(
    kind="vocab",
    hf_names=("lm_head.weight",),
    hf_shapes=(("vocab", "hidden"),),
    megatron_names=("output_layer.weight",),
)
ACCEPTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "quantization_config": ({},),
    }
)
