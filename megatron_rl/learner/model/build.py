"""[imports megatron] Builds a Megatron-Core GPT model from a Hugging Face config and loads this
rank's shard of the weights.

`build_model` takes a checkpoint folder and this rank's position in the layout, and returns this
rank's parts of the model (one for each virtual pipeline stage), wrapped in Megatron's own DDP. With
a GPU and Transformer Engine the layers are those of Transformer Engine, otherwise Megatron's own
with packed attention and this package's norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.config.choices import ActivationRecomputation, FP8Recipe
from megatron_rl.config.learner import OptimizerConfig
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.layout.cpu_device import is_cpu_run
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.attention import packed_attention_module
from megatron_rl.learner.model.experts import (
    expert_settings,
    hand_rows_to_experts,
    use_row_routing,
)
from megatron_rl.learner.model.head import score_chosen_positions
from megatron_rl.learner.model.implementations import check_implementations, uses_transformer_engine
from megatron_rl.learner.model.norm import root_mean_square_norm
from megatron_rl.weights.geometry import Geometry, read_hf_config
from megatron_rl.weights.huggingface import CheckpointReader
from megatron_rl.weights.rope import rope_parameters
from megatron_rl.weights.rules import TensorRule, hf_shapes, shard_from_hf, tensor_rules

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

# The setting -> Megatron's settings. Of a selective recomputation's layers, the results of the
# projections around attention are kept.
RECOMPUTATIONS: dict[ActivationRecomputation, dict[str, Any]] = {
    "none": {},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
# FP8 numbers have 4 bits of exponent; those of gradients have 5, except with a scale for each block
# (DeepSeek-V3, arXiv 2412.19437).
FP8: dict[FP8Recipe, dict[str, Any]] = {
    "none": {},
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(
    config: ModelConfig,
    geometry: Geometry,
    parallel: Parallel,
    optimizer: OptimizerConfig,
    *,
    has_routing_replay: bool = False,
) -> tuple[DistributedDataParallel, ...]:
    """This rank's parts of the model in layer order, loaded with the checkpoint's weights, each in
    Megatron's DDP with float32 gradients.

    Args:
        has_routing_replay: whether rows may bring the experts that their tokens are sent to.

    Raises:
        ConfigError: the model does not allow the layout or an option.
        DataError: tensors of the checkpoint are missing, truncated or have wrong shapes.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    geometry.check_layout(parallel.layout)
    check_implementations(config, optimizer)
    transformer = transformer_config(
        geometry, parallel, config, has_routing_replay=has_routing_replay
    )
    wrapped: list[DistributedDataParallel] = []
    for part in build_parts(geometry, parallel, transformer, config.path):
        # Megatron's Float16Module is not used, because it would cast the logits to float32; here
        # the logits keep their dtype.
        part.to(device=parallel.device, dtype=DTYPES[config.dtype])
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=optimizer.distributed,
            overlap_grad_reduce=optimizer.overlap_grad_reduce,
            overlap_param_gather=optimizer.overlap_param_gather,
        )
        # As Megatron's own training does, the later parts of a virtual pipeline have one bucket.
        ddp = DistributedDataParallel(
            transformer, ddp_config, part, disable_bucketing=bool(wrapped)
        )
        ddp.broadcast_params()
        wrapped.append(ddp)
    if optimizer.overlap_grad_reduce:
        # The schedule reduces gradients in the backward pass of the last row alone.
        without_reduction = [each.no_sync for each in wrapped]
        transformer.no_sync_func = without_reduction if len(wrapped) > 1 else without_reduction[0]
    return tuple(wrapped)


def transformer_config(
    geometry: Geometry,
    parallel: Parallel,
    model: ModelConfig,
    *,
    has_routing_replay: bool = False,
) -> TransformerConfig:
    """Megatron's settings for this model and layout."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    dtype, kernels = DTYPES[model.dtype], model.kernels
    has_fused_layers = uses_transformer_engine(model)
    return TransformerConfig(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_heads,
        num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.head_dim,
        tensor_model_parallel_size=parallel.tp_size,
        sequence_parallel=parallel.layout.sequence_parallel,
        context_parallel_size=parallel.layout.context,
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
        apply_rope_fusion=kernels.fused_rope,
        gradient_accumulation_fusion=kernels.fused_gradient_accumulation,
        persist_layer_norm=has_fused_layers,
        transformer_impl="transformer_engine" if has_fused_layers else "local",
        attention_backend=AttnBackend[kernels.attention],
        deterministic_mode=kernels.deterministic,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **_pipeline_settings(geometry, parallel.layout),
        **expert_settings(
            geometry.experts,
            parallel.layout,
            is_grouped=has_fused_layers,
            has_replay=has_routing_replay,
        ),
        **_recomputation_settings(geometry, model.activation_recomputation),
        **FP8[kernels.fp8],
    )


def _recomputation_settings(
    geometry: Geometry, recomputation: ActivationRecomputation
) -> dict[str, Any]:
    settings = RECOMPUTATIONS[recomputation]
    if recomputation == "selective" and geometry.experts:
        settings = settings | {"recompute_modules": ["core_attn", "moe"]}
    return settings


def _pipeline_settings(geometry: Geometry, layout: ParallelConfig) -> dict[str, Any]:
    is_virtual = layout.virtual_pipeline > 1
    settings: dict[str, Any] = {
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if is_virtual else None,
        # With two pipeline ranks, both neighbours in a virtual pipeline are the same rank; sends
        # and receives in one batch would be mixed up there, without an error. The overlapped
        # schedule does not batch them (pipeline_parallel/p2p_communication.py).
        "overlap_p2p_comm": is_virtual,
        "batch_p2p_comm": not is_virtual,
    }
    if layout.stage_layers:
        parts = [["decoder"] * count for count in geometry.parts(layout).num_layers]
        parts[0].insert(0, "embedding")
        parts[-1].append("loss")
        settings["pipeline_model_parallel_layout"] = parts
    return settings


def build_parts(
    geometry: Geometry, parallel: Parallel, transformer: TransformerConfig, model_path: str | Path
) -> list[GPTModel]:
    """This rank's parts of the model in layer order, with the weights of the checkpoint."""
    parts = empty_parts(geometry, parallel, transformer, model_path)
    load_weights(parts, geometry, parallel, CheckpointReader(model_path))
    return parts


def empty_parts(
    geometry: Geometry, parallel: Parallel, transformer: TransformerConfig, model_path: str | Path
) -> list[GPTModel]:
    """This rank's parts of the model in layer order; their weights are not initialised."""
    return [
        _build_gpt(geometry, parallel, transformer, model_path, number)
        for number in range(parallel.layout.virtual_pipeline)
    ]


def _build_gpt(
    geometry: Geometry,
    parallel: Parallel,
    transformer: TransformerConfig,
    model_path: str | Path,
    number: int,
) -> GPTModel:
    """Part `number` of this rank; its weights are not initialised."""
    from megatron.core.models.gpt import GPTModel

    vp_stage = number if parallel.layout.virtual_pipeline > 1 else None
    inverse_frequencies = None
    if geometry.has_rope_scaling or geometry.rope_theta != int(geometry.rope_theta):
        inverse_frequencies, scale = _hf_rope(geometry, model_path)
        if scale != 1.0:
            if transformer.apply_rope_fusion:
                raise ConfigError(
                    "model.kernels.fused_rope: expected false for a model with YaRN, whose "
                    "attention factor the fused kernel leaves out, got true"
                )
            # Megatron multiplies cosines and sines by 0.1 x ln(scale) + 1, where scale is this
            # attribute. Release 0.19 reads it while the layers are built
            # (transformer/attention.py).
            transformer.yarn_rotary_scaling_factor = scale
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=layer_spec(geometry, transformer, vp_stage),
        vocab_size=geometry.padded_vocab_size(parallel.tp_size),
        max_sequence_length=geometry.max_position_embeddings,
        pre_process=parallel.is_first_stage and number == 0,
        post_process=parallel.is_last_stage and number == parallel.layout.virtual_pipeline - 1,
        share_embeddings_and_output_weights=geometry.is_tied,
        position_embedding_type="rope",
        rotary_base=int(geometry.rope_theta),
        parallel_output=True,
        vp_stage=vp_stage,
    )
    if geometry.experts:
        hand_rows_to_experts(model)
    if model.post_process:
        score_chosen_positions(model)
    if inverse_frequencies is not None:
        model.rotary_pos_emb.inv_freq = inverse_frequencies.to(model.rotary_pos_emb.inv_freq.device)
    return model


def layer_spec(geometry: Geometry, transformer: TransformerConfig, vp_stage: int | None) -> object:
    """The layer spec: the modules that the layers of a part consist of."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    has_fused_layers = transformer.transformer_impl == "transformer_engine"
    options: dict[str, Any] = {
        "num_experts": geometry.experts.num_experts if geometry.experts else None,
        "moe_grouped_gemm": has_fused_layers and geometry.experts is not None,
        "qk_layernorm": geometry.has_qk_norm,
    }
    if has_fused_layers:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**options)
        use_row_routing(spec.submodules, geometry)
        return spec
    spec = gpt_layer_specs.get_gpt_layer_local_spec(**options, normalization="RMSNorm")
    norm, layer = root_mean_square_norm(), spec.submodules
    use_row_routing(layer, geometry)
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    attention = layer.self_attention.submodules
    attention.core_attention = packed_attention_module()
    if geometry.has_qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    num_layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


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
    parts: Sequence[GPTModel], geometry: Geometry, parallel: Parallel, reader: CheckpointReader
) -> None:
    """Read this rank's shard of every tensor of its parts of the model.

    Raises:
        DataError: the checkpoint's tensors do not match the geometry. ConfigError: the model has a
            parameter that no tensor rule covers.
    """
    unknown = {id(parameter): name for part in parts for name, parameter in part.named_parameters()}
    for rule, parameter in held_parameters(geometry, parallel, parts):
        for hf_name, expected in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True):
            if reader.shape(hf_name) != expected:
                raise DataError(
                    f"checkpoint tensor {hf_name}: expected shape {list(expected)} from "
                    "config.json, got "
                    f"{list(reader.shape(hf_name))}"
                )
        shard = shard_from_hf(rule, geometry, reader.read, *tensor_place(rule, parallel))
        with torch.no_grad():
            parameter.copy_(shard)
        unknown.pop(id(parameter))
    if unknown:
        raise ConfigError(
            f"model: no Hugging Face tensor is known for Megatron's {', '.join(unknown.values())}"
        )


def tensor_place(rule: TensorRule, parallel: Parallel) -> tuple[int, int]:
    """This rank's index among the ranks that hold shards of the tensor, and their number."""
    if rule.expert is None:
        return parallel.tp_rank, parallel.tp_size
    return parallel.etp_group.rank(), parallel.etp_group.size()


def held_parameters(
    geometry: Geometry, parallel: Parallel, parts: Sequence[torch.nn.Module]
) -> list[tuple[TensorRule, torch.nn.Parameter]]:
    """The parameters of this rank's parts of the model, each with its rule, in layer order."""
    pipeline = geometry.parts(parallel.layout)
    numbers = pipeline.of_rank(parallel.pp_rank)
    by_part = {
        number: dict(part.named_parameters()) for number, part in zip(numbers, parts, strict=True)
    }
    experts = parallel.own_experts(geometry.experts.num_experts if geometry.experts else 0)
    held = []
    for rule in tensor_rules(geometry):
        part = rule.part(pipeline)
        if part not in by_part or (rule.expert is not None and rule.expert not in experts):
            continue
        names = rule.local_names(pipeline.first_layer(part), experts.start)
        parameters = by_part[part]
        held.append((rule, parameters[next(name for name in names if name in parameters)]))
    if geometry.is_tied and parallel.is_last_stage and not parallel.is_first_stage:
        # The last stage holds its own copy of the embedding, as its output layer.
        head = by_part[pipeline.last]["output_layer.weight"]
        held.append((tensor_rules(geometry)[0], head))
    return held
