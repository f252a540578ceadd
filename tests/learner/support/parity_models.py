"""Tiny checkpoints with every tensor random, a recorded batch, and what transformers makes of them.

    python -m tests.learner.support.parity_models FOLDER

A process of its own: where the learner runs on the CPU, torch's factories are patched, and
transformers would load its models' buffers wrong there. FOLDER gets `<name>/` (a Hugging Face
checkpoint) and `<name>.pt`, a dict of

    sequences      list of [L] int64                 advantages  list of float
    prompt_lengths list of int                       rollout_logprobs  list of [L] float32
    logprobs       list of [L-1] float32: transformers', float32, of every token but the first
    entropy        list of [L-1] float32, in nats
    cool_logprobs, cool_entropy    the same at COOL, a temperature below 1
    gradients      dict of Hugging Face name -> gradient of the step's loss, before clipping
    bfloat16_logprobs  as logprobs, from transformers' model in bfloat16
    margins        list of [L-1] float32, of a mixture of experts: the least distance, over the
                   layers, of the logits of the last expert that is chosen and the first that is not
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

LENGTHS = (300, 256, 37, 2, 129, 64)  # tokens of the sequences; the first two span 256 and more
PROMPT_LENGTHS = (100, 1, 5, 1, 60, 63)  # of the training step; the parity is over every token
DUAL_VALUE = 0.1  # lambda of the recorded step
COOL = 0.7
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# Vocabularies: 131 leaves TP rank 1 three real columns of its 128, 97 none at all, 259 cuts a
# padded 512.
MODELS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE, vocab_size=131, head_dim=32, tie_word_embeddings=False),
    "qwen3_tied": Qwen3Config(
        **SHAPE, vocab_size=131, head_dim=16, tie_word_embeddings=True, rope_parameters=YARN
    ),
    "qwen2_tied": Qwen2Config(**SHAPE, vocab_size=97, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, vocab_size=259, tie_word_embeddings=False),
    "llama": LlamaConfig(
        **SHAPE, vocab_size=131, tie_word_embeddings=False, rope_parameters=LLAMA3
    ),
    "llama_tied": LlamaConfig(
        **SHAPE,
        vocab_size=131,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.5, "factor": 4.0},
    ),
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MOE_MODELS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, **EXPERTS, vocab_size=131, head_dim=32, norm_topk_prob=True
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, **EXPERTS, vocab_size=97, shared_expert_intermediate_size=80
    ),
    "mixtral": MixtralConfig(**SHAPE, vocab_size=259, num_local_experts=4, num_experts_per_tok=2),
}


def randomize(model: torch.nn.Module) -> None:
    """Draw every tensor anew: with default norms and biases, swapped ones would go unseen.

    The output layer's spread makes logits of about 2.5, so that the entropy is well below ln V.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3).add_(1.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(0.0, 2.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)


def chosen_and_entropy(
    logits: torch.Tensor, sequence: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From [L-1, V] logits: the next token's log-prob and the distribution's entropy, [L-1]."""
    distribution = logits.log_softmax(-1)
    chosen = distribution.gather(-1, sequence[1:, None])[:, 0]
    return chosen, -(distribution.exp() * distribution).sum(-1)


class RouterMargins:
    """The margins of the routers of a mixture of experts in the forward passes since `take`."""

    def __init__(self, model: torch.nn.Module, num_chosen: int) -> None:
        self._num_chosen = num_chosen
        self._found: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)

    def _note(self, router: torch.nn.Module, given: tuple[torch.Tensor, ...], _: Any) -> None:
        hidden = given[0].detach().reshape(-1, given[0].shape[-1])
        highest = (hidden @ router.weight.detach().T).topk(self._num_chosen + 1).values
        self._found.append(highest[:, -2] - highest[:, -1])

    def take(self) -> torch.Tensor:
        """[L]; the least of all layers."""
        least, self._found = torch.stack(self._found).amin(0), []
        return least


def by_expert(
    name: str, tensor: torch.Tensor, model_type: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint that a parameter consists of: transformers joins the experts of a
    layer when it loads them.
    """
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    start, _, last = name.rpartition(".")
    if model_type == "mixtral":
        parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
        name, start = (each.replace(".mlp.", ".block_sparse_moe.") for each in (name, start))
    if not start.endswith(".experts"):
        yield name, tensor
        return
    for expert, of_expert in enumerate(tensor):
        pieces = of_expert.chunk(len(parts[last]))
        for part, piece in zip(parts[last], pieces, strict=True):
            yield f"{start}.{expert}.{part}.weight", piece


def record(model: torch.nn.Module, vocab_size: int) -> dict[str, Any]:
    """The batch, transformers' log-probs, and its gradients of the step's loss (token mean)."""
    sequences = [torch.randint(0, vocab_size, (length,)) for length in LENGTHS]
    advantages = torch.randn(len(LENGTHS)).tolist()
    logprobs, entropy, cool_logprobs, cool_entropy = [], [], [], []
    rollout_logprobs, losses, count, margins = [], [], 0, []
    num_chosen = getattr(model.config, "num_experts_per_tok", 0)
    routers = RouterMargins(model, num_chosen) if num_chosen else None
    for sequence, prompt_length, advantage in zip(sequences, PROMPT_LENGTHS, advantages):
        logits = model(sequence[None]).logits[0, :-1]
        if routers is not None:
            margins.append(routers.take()[:-1])
        policy, of_policy = chosen_and_entropy(logits, sequence)
        cooled, of_cooled = chosen_and_entropy(logits.detach() / COOL, sequence)
        logprobs.append(policy.detach())
        entropy.append(of_policy.detach())
        cool_logprobs.append(cooled)
        cool_entropy.append(of_cooled)
        noisy = (policy.detach() + 0.05 * torch.randn_like(policy)).clamp(max=-1e-4)
        rollout_logprobs.append(torch.cat([torch.zeros(1), noisy]))
        is_kept = torch.arange(1, len(sequence)) >= prompt_length
        shaped = advantage - DUAL_VALUE * (policy.detach().exp() - noisy.exp()).abs()
        # At the weights that are recomputed the ratio is 1: the surrogate's gradient is A' dlogp.
        losses.append(-(shaped * policy)[is_kept].sum())
        count += int(is_kept.sum())
    (sum(losses) / count).backward()
    # Copies: a model that changes its dtype takes its gradients along.
    gradients = {
        name: gradient.clone()
        for parameter_name, parameter in model.named_parameters()
        for name, gradient in by_expert(parameter_name, parameter.grad, model.config.model_type)
    }
    with torch.no_grad():
        model.to(torch.bfloat16)
        of_bfloat16 = [model(sequence[None]).logits[0, :-1].float() for sequence in sequences]
    rounded = [chosen_and_entropy(*pair)[0] for pair in zip(of_bfloat16, sequences)]
    return {
        "sequences": sequences,
        "prompt_lengths": PROMPT_LENGTHS,
        "advantages": advantages,
        "rollout_logprobs": rollout_logprobs,
        "logprobs": logprobs,
        "entropy": entropy,
        "cool_logprobs": cool_logprobs,
        "cool_entropy": cool_entropy,
        "gradients": gradients,
        "bfloat16_logprobs": rounded,
        "margins": margins,
    }


def main(folder: Path) -> None:
    for number, (name, config) in enumerate((MODELS | MOE_MODELS).items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model)
        model.save_pretrained(folder / name)
        torch.save(record(model, config.vocab_size), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
