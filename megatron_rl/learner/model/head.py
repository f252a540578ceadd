"""[imports megatron] Restricts the output layer to the positions of a row whose logits are needed.

Logits have as many columns as the vocabulary and are the largest tensor of a step. Those of prompts
and padding are never used, so the hidden states of the other positions are selected before the
product with the output layer's weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def score_chosen_positions(model: GPTModel) -> None:
    """Make the model's last part return the logits of the positions in
    `packed_seq_params.scored_positions`, [K] int64 ascending, as [1, K, V / TP].

    With sequence parallelism the hidden states of all positions are gathered before the selection,
    because the ranks' numbers of chosen positions differ; the output layer then works as it does
    without sequence parallelism.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    head, group = model.output_layer, model.pg_collection.tp
    is_sequence_parallel = head.sequence_parallel
    head.sequence_parallel, head.allreduce_dgrad = False, group.size() > 1
    chosen: list[torch.Tensor] = []

    def remember(_: torch.nn.Module, __: Any, settings: dict[str, Any]) -> None:
        chosen[:] = [settings["packed_seq_params"].scored_positions]

    def select(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = given[0]  # [T, 1, H], or [T / TP, 1, H] with sequence parallelism
        if is_sequence_parallel:
            # The output layer adds the gradients over the ranks, so each takes its part of the sum.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=group
            )
        return (hidden.index_select(0, chosen[0]), *given[1:])

    model.register_forward_pre_hook(remember, with_kwargs=True)
    head.register_forward_pre_hook(select)
