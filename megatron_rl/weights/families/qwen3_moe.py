"""Qwen3-MoE: Qwen3's attention, and experts in every layer."""

from megatron_rl.weights.families import family

FAMILY = family.ModelFamily(
    model_type="qwen3_moe",
    embedding=family.EMBEDDING,
    layer=(
        family.ATTENTION_NORM,
        family.QKV_WEIGHT,
        family.QUERY_NORM,
        family.KEY_NORM,
        family.ATTENTION_OUTPUT,
        family.EXPERTS_NORM,
        family.ROUTER,
        family.EXPERT_GATE_AND_UP,
        family.EXPERT_DOWN,
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=None,
    accepted={**family.ACCEPTED, "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    experts=family.ExpertKeys(
        num_experts=("num_experts", "num_local_experts"),
        ffn="moe_intermediate_size",
        shared_ffn=None,
        is_normalised="norm_topk_prob",
    ),
)
