"""Qwen3, dense: Llama's layers with a norm of every query and key head."""

from megatron_rl.weights.families import family

FAMILY = family.ModelFamily(
    model_type="qwen3",
    embedding=family.EMBEDDING,
    layer=(
        family.ATTENTION_NORM,
        family.QKV_WEIGHT,
        family.QUERY_NORM,
        family.KEY_NORM,
        family.ATTENTION_OUTPUT,
        family.MLP_NORM,
        family.GATE_AND_UP,
        family.DOWN,
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=128,
    accepted=family.ACCEPTED,
)
