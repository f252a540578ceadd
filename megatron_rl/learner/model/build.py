"""[imports megatron] Builds a Megatron-Core GPT model from a Hugging Face config and loads this
rank's shard of the weights.

`build_model` takes a checkpoint folder and this rank's position in the layout, and returns the
model of this pipeline stage, wrapped in Megatron's own DDP. With a GPU and Transformer Engine the
layers are those of Transformer Engine, otherwise Megatron's own with packed attention.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_rl.config.model import ModelConfig
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.layout.cpu_device import is_cpu_run
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.attention import packed_attention_module
from megatron_rl.weights.geometry import Geometry, read_hf_config, rope_parameters
from megatron_rl.weights.huggingface import CheckpointReader
from megatron_rl.weights.rules import TensorRule, hf_shapes, shard_from_hf, tensor_rules

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(
    config: ModelConfig, geometry: Geometry, parallel: Parallel, *, use_distributed_optimizer: bool
) -> DistributedDataParallel:
    """This rank's pipeline stage, loaded with the checkpoint's weights, in Megatron's DDP with
    float32 gradients.

    Raises:
        ConfigError: the model does not allow the layout or an option.
        DataError: tensors of the checkpoint are missing, truncated or have wrong shapes.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    geometry.check_layout(parallel.tp_size, parallel.pp_size)
    transformer = transformer_config(geometry, parallel, DTYPES[config.dtype])
    model = build_gpt(geometry, parallel, transformer, config.path)
    load_weights(model, geometry, parallel, CheckpointReader(config.path))
    # Megatron's Float16Module is not used, because it would cast the logits to float32; here the
    # logits keep their dtype.
    model.to(device=parallel.device, dtype=DTYPES[config.dtype])
    ddp = DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=use_distributed_optimizer
        ),
        model,
    )
    ddp.broadcast_params()
    return ddp


def transformer_config(
    geometry: Geometry, parallel: Parallel, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's settings for this model and layout."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_heads,
        num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.head_dim,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        use_cpu_initialization=is_cpu_run(),
        # This also sets the attributes by which gradient norms and checkpoints tell shards from
        # copies.
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=geometry.norm_epsilon,
        qk_layernorm=geometry.has_qk_norm,
        add_bias_linear=False,
        add_qkv_bias=geometry.has_qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=not is_cpu_run() and has_transformer_engine(),
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it is installed, and there is a GPU."""
    return not is_cpu_run() and importlib.util.find_spec("transformer_engine") is not None


def build_gpt(
    geometry: Geometry, parallel: Parallel, transformer: TransformerConfig, model_path: str | Path
) -> GPTModel:
    """The GPT model of this stage; its weights are not initialised."""
    from megatron.core.models.gpt import GPTModel

    inverse_frequencies = None
    if geometry.has_rope_scaling or geometry.rope_theta != int(geometry.rope_theta):
        inverse_frequencies, scale = _hf_rope(geometry, model_path)
        if scale != 1.0:
            # Megatron multiplies cosines and sines by 0.1 x ln(scale) + 1, where scale is this
            # attribute. Release 0.19 reads it while the layers are built
            # (transformer/attention.py).
            transformer.yarn_rotary_scaling_factor = scale
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=layer_spec(geometry),
        vocab_size=geometry.padded_vocab_size(parallel.tp_size),
        max_sequence_length=geometry.max_position_embeddings,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        share_embeddings_and_output_weights=geometry.is_tied,
        position_embedding_type="rope",
        rotary_base=int(geometry.rope_theta),
        parallel_output=True,
    )
    if inverse_frequencies is not None:
        model.rotary_pos_emb.inv_freq = inverse_frequencies.to(model.rotary_pos_emb.inv_freq.device)
    return model


def layer_spec(geometry: Geometry) -> object:
    """The layer spec: the modules that the layers consist of."""
    from megatron.core.models.gpt import gpt_layer_specs

    if has_transformer_engine():
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=geometry.has_qk_norm
        )
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=geometry.has_qk_norm, normalization="RMSNorm"
    )
    spec.submodules.self_attention.submodules.core_attention = packed_attention_module()
    return spec


def _hf_rope(geometry: Geometry, model_path: str | Path) -> tuple[torch.Tensor, float]:
    """The inverse frequencies, [head_dim / 2] float32, as transformers computes them, so that every
    rope scaling means the same on both sides; and the scale from which YaRN's attention factor is
    computed (1: no such factor).
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not geometry.has_rope_scaling:
        exponents = torch.arange(0, geometry.head_dim, 2, dtype=torch.float32) / geometry.head_dim
        return 1.0 / geometry.rope_theta**exponents, 1.0
    rope = rope_parameters(read_hf_config(model_path))
    hf_config = AutoConfig.from_pretrained(model_path, local_files_only=True)
    inverse, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, torch.device("cpu"))
    if factor == 1.0:
        return inverse, 1.0
    expected = 0.1 * math.log(rope["factor"]) + 1.0
    if abs(factor - expected) > 1e-6:
        raise ConfigError(
            f"model.path={model_path}: expected YaRN's attention factor {expected:.6f} for a scale "
            f"of {rope['factor']}, got {factor:.6f}; the learner builds only the standard one"
        )
    return inverse, float(rope["factor"])


def load_weights(
    model: GPTModel, geometry: Geometry, parallel: Parallel, reader: CheckpointReader
) -> None:
    """Read this rank's shard of every tensor of this stage.

    Raises:
        DataError: the checkpoint's tensors do not match the geometry. ConfigError: the model has a
            parameter that no tensor rule covers.
    """
    parameters = dict(model.named_parameters())
    for rule, name in stage_tensors(geometry, parallel, parameters):
        for hf_name, expected in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True):
            if reader.shape(hf_name) != expected:
                raise DataError(
                    f"checkpoint tensor {hf_name}: expected shape {list(expected)} from "
                    "config.json, got "
                    f"{list(reader.shape(hf_name))}"
                )
        shard = shard_from_hf(rule, geometry, reader.read, parallel.tp_rank, parallel.tp_size)
        with torch.no_grad():
            parameters.pop(name).copy_(shard)
    if parameters:
        raise ConfigError(
            f"model: no Hugging Face tensor is known for Megatron's {', '.join(parameters)}"
        )


def stage_tensors(
    geometry: Geometry, parallel: Parallel, parameters: dict[str, torch.Tensor]
) -> list[tuple[TensorRule, str]]:
    """The rules of this stage's tensors, each with the parameter's name in this stage's model."""
    found = []
    first_layer = parallel.pp_rank * (geometry.num_layers // parallel.pp_size)
    for rule in tensor_rules(geometry):
        if rule.stage(geometry.num_layers, parallel.pp_size) != parallel.pp_rank:
            continue
        names = rule.megatron_names
        if rule.layer is not None:  # a stage numbers its own layers from 0
            here = f"decoder.layers.{rule.layer - first_layer}."
            names = tuple(name.replace(f"decoder.layers.{rule.layer}.", here) for name in names)
        found.append((rule, next(name for name in names if name in parameters)))
    if geometry.is_tied and parallel.is_last_stage and not parallel.is_first_stage:
        # The last stage holds its own copy of the embedding, as its output layer.
        found.append((tensor_rules(geometry)[0], "output_layer.weight"))
    return found
