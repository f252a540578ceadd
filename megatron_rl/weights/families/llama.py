"""Llama 2 and 3: no norm of query and key heads, no biases."""

from megatron_rl.weights.families import family

FAMILY = family.ModelFamily(
    model_type="llama",
    embedding=family.EMBEDDING,
    layer=(
        family.ATTENTION_NORM,
        family.QKV_WEIGHT,
        family.ATTENTION_OUTPUT,
        family.MLP_NORM,
        family.GATE_AND_UP,
        family.DOWN,
    ),
    final_norm=family.FINAL_NORM,
    head=family.HEAD,
    default_head_dim=None,
    # transformers ignores a window, but vLLM applies it to every layer.
    accepted={**family.ACCEPTED, "sliding_window": (0,)},
)
