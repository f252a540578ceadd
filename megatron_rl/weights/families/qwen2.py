"""Qwen2 and Qwen2.5: Llama's layers with biases of query, key and value."""

from megatron_rl.weights.families import family

FAMILY = family.ModelFamily(
    model_type="qwen2",
    embedding=family.EMBEDDING,
    layer=(
        family.ATTENTION_NORM,
        family.QKV_WEIGHT,
        family.QKV_BIAS,
        family.ATTENTION_OUTPUT,
        family.MLP_NORM,
        family.GATE_AND_UP,
        family.DOWN,
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=None,
    # These models always have the biases, independently of config.json.
    accepted={**family.ACCEPTED, "attention_bias": (False, True)},
)
