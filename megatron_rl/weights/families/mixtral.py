"""Mixtral: Llama's attention, and experts in every layer, with names of their own."""

from megatron_rl.weights.families import family

EXPERT = "block_sparse_moe.experts.{expert}."

FAMILY = family.ModelFamily(
    model_type="mixtral",
    embedding=family.EMBEDDING,
    layer=(
        family.ATTENTION_NORM,
        family.QKV_WEIGHT,
        family.ATTENTION_OUTPUT,
        family.EXPERTS_NORM,
        family.layer_row(
            "replicated",
            {"block_sparse_moe.gate.weight": ("experts", "hidden")},
            "mlp.router.weight",
        ),
        family.layer_row(
            "gate_up",
            {
                EXPERT + "w1.weight": ("expert_ffn", "hidden"),
                EXPERT + "w3.weight": ("expert_ffn", "hidden"),
            },
            *family.EXPERT_GATE_AND_UP_NAMES,
        ),
        family.layer_row(
            "row", {EXPERT + "w2.weight": ("hidden", "expert_ffn")}, *family.EXPERT_DOWN_NAMES
        ),
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=None,
    default_rope_theta=1e6,
    accepted={**family.ACCEPTED, "sliding_window": (0,)},
    experts=family.ExpertKeys(
        num_experts=("num_local_experts",),
        ffn="intermediate_size",
        shared_ffn=None,
        is_normalised=None,
    ),
)
