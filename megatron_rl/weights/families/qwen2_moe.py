"""Qwen2-MoE: Qwen2's attention, experts in every layer, and a shared expert with a gate."""

from megatron_rl.weights.families import family

FAMILY = family.ModelFamily(
    model_type="qwen2_moe",
    embedding=family.EMBEDDING,
    layer=(
        family.ATTENTION_NORM,
        family.QKV_WEIGHT,
        family.QKV_BIAS,
        family.ATTENTION_OUTPUT,
        family.EXPERTS_NORM,
        family.ROUTER,
        family.EXPERT_GATE_AND_UP,
        family.EXPERT_DOWN,
        family.layer_row(
            "gate_up",
            {
                "mlp.shared_expert.gate_proj.weight": ("shared_ffn", "hidden"),
                "mlp.shared_expert.up_proj.weight": ("shared_ffn", "hidden"),
            },
            "mlp.shared_experts.linear_fc1.weight",
        ),
        family.layer_row(
            "row",
            {"mlp.shared_expert.down_proj.weight": ("hidden", "shared_ffn")},
            "mlp.shared_experts.linear_fc2.weight",
        ),
        family.layer_row(
            "replicated",
            {"mlp.shared_expert_gate.weight": ("one", "hidden")},
            "mlp.shared_experts.gate_weight",
        ),
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=None,
    accepted={
        **family.ACCEPTED,
        # These models always have the biases, independently of attention_bias.
        "attention_bias": (False, True),
        "qkv_bias": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
    },
    experts=family.ExpertKeys(
        num_experts=("num_experts", "num_local_experts"),
        ffn="moe_intermediate_size",
        shared_ffn="shared_expert_intermediate_size",
        is_normalised="norm_topk_prob",
    ),
)
