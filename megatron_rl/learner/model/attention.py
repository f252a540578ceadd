"""Causal attention over packed rows, for machines without Transformer Engine.

Megatron-Core's own `DotProductAttention` refuses packed sequences
(transformer/dot_product_attention.py), so the layer spec uses this module instead. It takes `query
[T, heads, dim]`, `key` and `value [T, groups, dim]` and the boundaries of the sequences, and
returns `[T, heads x dim]`; no position attends to another sequence. Sequences of similar length are
stacked and passed to torch's scaled_dot_product_attention together. The result for a sequence does
not depend on the other sequences of its stack, because its padding comes last and attention is
causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH_STEP = 8  # lengths are rounded up to a multiple of this, so that few stacks are needed


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPlan:
    """How the sequences of one packed row are stacked. Built once per row and used by every layer.

    Example: sequences of 3 and 5 positions at 0 and 3 of T=9: one stack of width 8, `gather=([0..2,
    0.., 3..7, 3..],)` of shape [2, 8]; `scatter` picks the 8 real positions out of the 16 and a
    zero for the row's last one.
    """

    gather: tuple[Tensor, ...]  # [n, width] int64 for each stack: the row position of every entry
    # [T] int64: the index of every row position in the concatenated stacks; for positions without a
    # sequence it is one past the end, where a zero is appended
    scatter: Tensor


def plan_stacks(cu_seqlens: Tensor, cu_seqlens_padded: Tensor, num_tokens: int) -> StackPlan:
    """Plan the stacks of a row of `num_tokens` positions whose sequences start at
    `cu_seqlens_padded`, [S+1] int32.
    """
    starts = cu_seqlens_padded[:-1].to(torch.int64)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    widths = (lengths + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP
    num_stacked = int(widths.sum())
    scatter = torch.full((num_tokens,), num_stacked, dtype=torch.int64, device=starts.device)
    gather, offset = [], 0
    for width in widths.unique().tolist():
        if width == 0:
            continue
        chosen = (widths == width).nonzero()[:, 0]
        steps = torch.arange(width, device=starts.device)
        is_real = steps < lengths[chosen, None]
        positions = starts[chosen, None] + torch.where(is_real, steps, 0)
        places = offset + torch.arange(positions.numel(), device=starts.device).view_as(positions)
        scatter[positions[is_real]] = places[is_real]
        gather.append(positions)
        offset += positions.numel()
    return StackPlan(gather=tuple(gather), scatter=scatter)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: StackPlan, scale: float
) -> Tensor:
    """Causal attention within each sequence of a row.

    Args:
        query: [T, heads, dim]; key, value: [T, groups, dim]; any floating dtype.
    Returns:
        [T, heads, dim]; zeros at positions without a sequence.
    """
    outputs = []
    for positions in plan.gather:
        flat = positions.flatten()
        stacked = (
            tensor.index_select(0, flat).view(*positions.shape, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (query, key, value)
        )
        output = F.scaled_dot_product_attention(
            *stacked, is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).reshape(-1, *query.shape[1:]))
    outputs.append(query.new_zeros(1, *query.shape[1:]))
    return torch.cat(outputs).index_select(0, plan.scatter)


def packed_attention_module() -> type:
    """The class that a Megatron layer spec takes as `core_attention`. It is defined on demand,
    because it derives from a class of Megatron's.
    """
    from megatron.core.transformer.module import MegatronModule

    class PackedAttention(MegatronModule):
        """Replaces Megatron's DotProductAttention; needs `packed_seq_params.stack_plan`."""

        def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
            super().__init__(config=config)
            self._scale = softmax_scale or config.kv_channels**-0.5

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *_: Any,
            packed_seq_params: Any,
            **__: Any,
        ) -> Tensor:
            output = packed_attention(query, key, value, packed_seq_params.stack_plan, self._scale)
            return output.flatten(1)

    return PackedAttention
