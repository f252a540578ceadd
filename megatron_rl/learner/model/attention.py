"""Causal attention over packed rows, for machines without Transformer Engine.

Megatron-Core's own `DotProductAttention` refuses packed sequences
(transformer/dot_product_attention.py), so the layer spec uses this module instead. It takes `query
[T, heads, dim]`, `key` and `value [T, groups, dim]` and the boundaries of the sequences, and
returns `[T, heads x dim]`; no position attends to another sequence. Sequences of similar length are
stacked and passed to torch's scaled_dot_product_attention together. The result for a sequence does
not depend on the other sequences of its stack, because its padding comes last and attention is
causal.

With context parallelism a rank has some pieces of every sequence (learner/layout/context.py). The
keys and values of the whole row are gathered from the ranks, and each piece attends to its sequence
from the beginning to its own end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.learner.layout.context import RowShare

WIDTH_STEP = 8  # lengths are rounded up to a multiple of this, so that few stacks are needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Sequences, or pieces of them, of similar length. Example of one sequence of two positions at
    3: `Stack(queries=[[3, 4]], keys=[[3, 4]], mask=None)`.
    """

    queries: Tensor  # [n, width] int64: the index of every entry among this rank's positions
    keys: Tensor  # [n, key width] int64: the index among the positions of all ranks
    mask: Tensor | None  # [n, 1, width, key width] bool, True where attended; None: causal


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPlan:
    """How the sequences of one packed row are stacked. Built once per row and used by every layer.

    Example: sequences of 3 and 5 positions at 0 and 3 of T=9: one stack of width 8, `queries=[0..2,
    0.., 3..7, 3..]` of shape [2, 8]; `scatter` picks the 8 real positions out of the 16 and a
    zero for the row's last one.
    """

    stacks: tuple[Stack, ...]
    # [T / CP] int64: the index of each of this rank's positions in the concatenated stacks; for
    # positions without a sequence it is one past the end, where a zero is appended
    scatter: Tensor
    share: RowShare  # this rank's positions


def plan_stacks(cu_seqlens: Tensor, cu_seqlens_padded: Tensor, share: RowShare) -> StackPlan:
    """Plan the stacks of a row's positions on this rank.

    Args:
        cu_seqlens, cu_seqlens_padded: [S+1] int32, as in `MicroBatch`.
    """
    starts = cu_seqlens_padded[:-1].to(torch.int64)[share.sequence]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)[share.sequence]
    offsets = share.offset
    num_queries = torch.minimum((lengths - offsets).clamp(min=0), share.length)
    num_keys = torch.where(num_queries > 0, offsets + num_queries, 0)
    widths, key_widths = _rounded_up(num_queries), _rounded_up(num_keys)
    num_stacked = int(widths.sum())
    device = starts.device
    scatter = torch.full((share.own.numel(),), num_stacked, dtype=torch.int64, device=device)
    stacks, total = [], 0
    for width, key_width in torch.stack([widths, key_widths], 1).unique(dim=0).tolist():
        if width == 0:
            continue
        chosen = ((widths == width) & (key_widths == key_width)).nonzero()[:, 0]
        queries, is_real = _entries(share.place[chosen], num_queries[chosen], width)
        places = total + torch.arange(queries.numel(), device=device).view_as(queries)
        scatter[queries[is_real]] = places[is_real]
        total += queries.numel()
        if share.group is None:
            stacks.append(Stack(queries=queries, keys=queries, mask=None))
            continue
        keys, _ = _entries(starts[chosen], num_keys[chosen], key_width)
        last = offsets[chosen, None] + torch.arange(width, device=device)
        mask = torch.arange(key_width, device=device) <= last[:, None, :, None]
        stacks.append(Stack(queries=queries, keys=share.order[keys], mask=mask))
    return StackPlan(stacks=tuple(stacks), scatter=scatter, share=share)


def _rounded_up(counts: Tensor) -> Tensor:
    return (counts + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP


def _entries(starts: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The positions of [n] runs, one run a line, [n, width] int64: what follows a run repeats its
    first position; and where an entry belongs to the run, bool.
    """
    steps = torch.arange(width, device=starts.device)
    is_real = steps < lengths[:, None]
    return starts[:, None] + torch.where(is_real, steps, 0), is_real


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: StackPlan, scale: float
) -> Tensor:
    """Causal attention within each sequence of a row.

    Args:
        query: [T / CP, heads, dim]; key, value: [T / CP, groups, dim]; any floating dtype.
    Returns:
        [T / CP, heads, dim]; zeros at positions without a sequence.
    """
    nothing = query.new_zeros(1, *query.shape[1:])
    if plan.share.group is not None:
        key, value = plan.share.gather_row(torch.cat([key, value], -1)).split(key.shape[-1], -1)
        # The backward pass of the gathering is a collective. A rank without a piece of a sequence
        # must take part in it, so its output depends on the keys too.
        nothing = nothing + key[:0].sum() + query[:0].sum()
    outputs = []
    for stack in plan.stacks:
        stacked = (
            tensor.index_select(0, at.flatten()).view(*at.shape, *tensor.shape[1:]).transpose(1, 2)
            for tensor, at in ((query, stack.queries), (key, stack.keys), (value, stack.keys))
        )
        output = F.scaled_dot_product_attention(
            *stacked,
            attn_mask=stack.mask,
            is_causal=stack.mask is None,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(output.transpose(1, 2).reshape(-1, *query.shape[1:]))
    outputs.append(nothing)
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
