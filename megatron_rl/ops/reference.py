"""The aligned log-prob in plain torch; the kernels must give the same bits.

    logprob = y[label] - log sum exp(y),   y = logits / temperature, over the true vocabulary

A sum of exponentials is kept as a node (N, S), which stands for S * 2^N with S in float32. Each
granule of 128 global columns is summed relative to its own maximum, the nodes are merged pairwise
in a tree whose shape depends only on global positions, and the root is finished in float64. Each
step is rounded once (arithmetic.py); csrc/ performs the same steps.

`nodes`, `finish` and `gradient` also run on a CUDA device if the extension was built without CUDA
kernels: they perform the same steps but are much slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.ops.arithmetic import (
    CHUNK_ELEMENTS,
    DROPPED,
    LARGEST_LOGIT,
    LN2,
    LOG2E,
    MAGIC,
    REACH,
    logarithm,
    multiply_add,
    power_of_half,
    scaled,
    term,
)
from megatron_rl.ops.node_layout import GRANULE, NodeLayout, node_layout, words_per_row

EMPTY_EXPONENT = -(2**30)  # of a node whose columns are all -inf
COLUMN_BITS = (4, 5, 6, 0, 1, 2, 3)  # the order in which the columns of a granule are added


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """K neighbouring nodes of each of N rows: three tensors [N, K]."""

    exponent: torch.Tensor  # N, int32
    sum: torch.Tensor  # S, float32
    weighted: torch.Tensor  # B: S's terms times (y - N ln 2), float32

    def __getitem__(self, columns: slice) -> Nodes:
        return Nodes(
            exponent=self.exponent[:, columns],
            sum=self.sum[:, columns],
            weighted=self.weighted[:, columns],
        )


def granules(y: torch.Tensor) -> Nodes:
    """The nodes of K whole granules.

    Args:
        y: [N, K * 128] float32, with -inf where there is no column.

    Returns:
        Tensors [N, K].
    """
    y = y.unflatten(1, (-1, GRANULE))
    maximum = y.amax(2)
    is_empty = maximum.isneginf()
    raised = maximum.clamp(min=-LARGEST_LOGIT)
    exponent = multiply_add(raised, LOG2E, MAGIC) - MAGIC
    y = torch.maximum(y, (raised - REACH)[..., None])
    e = term(y, (MAGIC - exponent)[..., None])
    weighted = e * multiply_add(-exponent[..., None].expand_as(y), LN2, y)
    # A broken row gets an empty node; `finish` recognises it by its maximum.
    is_empty |= ~(maximum <= LARGEST_LOGIT)
    return Nodes(
        exponent=torch.where(is_empty, float(EMPTY_EXPONENT), exponent).int(),
        sum=torch.where(is_empty, 0.0, _add_columns(e)),
        weighted=torch.where(is_empty, 0.0, _add_columns(weighted)),
    )


def _add_columns(x: torch.Tensor) -> torch.Tensor:
    """[N, K, 128] to [N, K]."""
    x = x.unflatten(2, (2,) * 7)  # dimension 8 - b is bit b of the column
    for bit in COLUMN_BITS:
        dimension = 8 - bit
        x = x.narrow(dimension, 0, 1) + x.narrow(dimension, 1, 1)
    return x.flatten(1)


def merge(left: Nodes, right: Nodes) -> Nodes:
    """Merge each node of `left` with its sibling in `right`, both [N, K]."""
    is_swapped = left.exponent < right.exponent

    def pick(name: str, is_right: torch.Tensor) -> torch.Tensor:
        return torch.where(is_right, getattr(right, name), getattr(left, name))

    high, low = (
        {name: pick(name, is_right) for name in ("exponent", "sum", "weighted")}
        for is_right in (is_swapped, ~is_swapped)
    )
    k = high["exponent"] - low["exponent"]
    is_dropped = k >= DROPPED
    scale = power_of_half(torch.where(is_dropped, 0, k))
    shifted = multiply_add(low["sum"], -(k.float() * LN2), low["weighted"])
    total = high["sum"] + low["sum"] * scale
    weighted = high["weighted"] + shifted * scale
    return Nodes(
        exponent=high["exponent"],
        sum=torch.where(is_dropped, high["sum"], total),
        weighted=torch.where(is_dropped, high["weighted"], weighted),
    )


def merge_levels(leaves: Nodes) -> Nodes:
    """Merge 2^l neighbours pairwise into one node, [N, 2^l] to [N, 1]."""
    while leaves.sum.shape[1] > 1:
        leaves = merge(leaves[0::2], leaves[1::2])
    return leaves


def nodes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    edges: Sequence[int],
    rank: int,
    vocab_size: int,
    has_entropy: bool,
) -> torch.Tensor:
    """The words that this rank sends.

    Args:
        logits: [N, V] float32, bfloat16 or float16: the columns edges[rank] to edges[rank + 1].
        labels: [N] int64, global token ids.
        edges, rank, vocab_size: as in `node_layout`.

    Returns:
        [N, W] int32, in the layout of node_layout.py.
    """
    width = words_per_row(edges, vocab_size, has_entropy=has_entropy)
    words = torch.zeros(logits.shape[0], width, dtype=torch.int32, device=logits.device)
    layout = node_layout(edges, rank, vocab_size)
    step = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        y = scaled(logits[rows, : layout.columns[1] - layout.columns[0]], temperature)
        row_words = _row_words(y, labels[rows], layout, has_entropy)
        words[rows, : row_words.shape[1]] = row_words
    return words


def _row_words(
    y: torch.Tensor, labels: torch.Tensor, layout: NodeLayout, has_entropy: bool
) -> torch.Tensor:
    begin, end = layout.columns
    is_local = (labels >= begin) & (labels < end)
    padded = torch.nn.functional.pad(y, (0, 1), value=0.0)  # the last one for other ranks' labels
    label_logit = padded.gather(1, torch.where(is_local, labels - begin, end - begin)[:, None])
    complete = y[:, layout.head[1] - begin : layout.tail[0] - begin]
    maximum = torch.nn.functional.pad(complete, (0, 1), value=-math.inf).amax(1, keepdim=True)
    missing = -complete.shape[1] % GRANULE
    leaves = granules(torch.nn.functional.pad(complete, (0, missing), value=-math.inf))
    parts = [maximum.view(torch.int32), label_logit.view(torch.int32)]
    for granule, level in layout.nodes:
        first = granule - layout.nodes[0][0]
        node = merge_levels(leaves[first : first + 2**level])
        parts += [node.exponent, node.sum.view(torch.int32)]
        if has_entropy:
            parts.append(node.weighted.view(torch.int32))
    for first, last in (layout.head, layout.tail):
        parts.append(y[:, first - begin : last - begin].contiguous().view(torch.int32))
    return torch.cat(parts, dim=1)


def finish(
    words: torch.Tensor,
    labels: torch.Tensor,
    edges: Sequence[int],
    vocab_size: int,
    has_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs and entropies from the words of all ranks.

    Args:
        words: [R, N, W] int32, in rank order.
        labels, edges, vocab_size: as in `nodes`.

    Returns:
        logprobs [N] float32; entropy [N] float32 in nats ([0] without entropy); N [N] int32 and S
        [N] float32 of the root; and the largest y of the row [N] float32, NaN if the row holds a
        NaN. If the largest y is not within +-2^21, log-prob and entropy are NaN.
    """
    pieces: list[tuple[int, int, Nodes]] = []  # (first granule, level, node [N, 1])
    cut: dict[int, torch.Tensor] = {}  # granule -> its columns [N, 128]
    num_rows = labels.shape[0]
    label_logit = torch.full((num_rows,), math.nan, device=words.device)
    maxima = [words[:, :, 0].view(torch.float32).T]
    for rank in range(len(edges) - 1):
        layout = node_layout(edges, rank, vocab_size)
        is_local = (labels >= layout.columns[0]) & (labels < layout.columns[1])
        label_logit = torch.where(is_local, words[rank, :, 1].view(torch.float32), label_logit)
        at = 2
        for granule, level in layout.nodes:
            piece, at = _read_node(words[rank], at, has_entropy)
            pieces.append((granule, level, piece))
        for column in (*range(*layout.head), *range(*layout.tail)):
            empty = torch.full((num_rows, GRANULE), -math.inf, device=words.device)
            columns = cut.setdefault(column // GRANULE, empty)
            columns[:, column % GRANULE] = words[rank, :, at].view(torch.float32)
            at += 1
    for granule, columns in cut.items():
        pieces.append((granule, 0, granules(columns)))
        maxima.append(columns)
    root = _root(sorted(pieces, key=lambda piece: piece[0]))
    maximum = torch.cat(maxima, dim=1).amax(1)
    is_sound = maximum.abs() <= LARGEST_LOGIT

    total = root.sum[:, 0].double()
    log_total = logarithm(torch.where(is_sound, total, 1.0))
    logprobs = label_logit.double() - (root.exponent[:, 0].double() * LN2 + log_total)
    entropy = log_total - root.weighted[:, 0].double() / total
    return (
        torch.where(is_sound, logprobs.clamp(max=0.0), math.nan).float(),
        torch.where(is_sound, entropy.clamp(min=0.0), math.nan).float()[: num_rows * has_entropy],
        root.exponent[:, 0].contiguous(),
        root.sum[:, 0].contiguous(),
        maximum,
    )


def _read_node(words: torch.Tensor, at: int, has_entropy: bool) -> tuple[Nodes, int]:
    total = words[:, at + 1 : at + 2].contiguous().view(torch.float32)
    weighted = words[:, at + 2 : at + 3].contiguous().view(torch.float32)
    node = Nodes(
        exponent=words[:, at : at + 1],
        sum=total,
        weighted=weighted if has_entropy else torch.zeros_like(total),
    )
    return node, at + (3 if has_entropy else 2)


def _root(pieces: list[tuple[int, int, Nodes]]) -> Nodes:
    """Merge siblings from left to right, then the nodes without a sibling from right to left."""
    stack: list[tuple[int, int, Nodes]] = []
    for granule, level, node in pieces:
        while (
            stack
            and stack[-1][1] == level
            and stack[-1][0] >> (level + 1) == (granule >> (level + 1))
        ):
            granule, _, left = stack.pop()
            node, level = merge(left, node), level + 1
        stack.append((granule, level, node))
    root = stack.pop()[2]
    while stack:
        root = merge(stack.pop()[2], root)
    return root


def gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    incoming: torch.Tensor,
    exponent: torch.Tensor,
    total: torch.Tensor,
    temperature: float,
    first_column: int,
    vocab_size: int,
    grad_logits: torch.Tensor,
) -> None:
    """Fill grad_logits [N, V], of the logits' dtype, with the gradient of the log-probs.

    Args:
        logits: [N, V], this rank's shard. labels: [N] int64, global token ids.
        incoming: [N] float32. A row where it is 0 gets +0, and so do padded columns.
        exponent, total: N [N] int32 and S [N] float32 of the root, as `finish` returned them.
        first_column: global index of the shard's first column.
        vocab_size: V; global columns from V on are padding.
        grad_logits: overwritten; it may be `logits` itself.
    """
    width = min(max(vocab_size - first_column, 0), logits.shape[1])
    grad_logits[:, width:] = 0.0
    if width == 0:
        return
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        y = scaled(logits[rows, :width], temperature)
        n = exponent[rows, None]
        floor = ((n - DROPPED).double() * LN2).float()
        e = term(torch.maximum(y, floor), MAGIC - n.float())
        inverse = torch.ones_like(total[rows, None]) / total[rows, None]
        p = torch.where(y < floor, 0.0, e) * inverse
        factor = scaled(incoming[rows, None], temperature)
        columns = torch.arange(first_column, first_column + width, device=logits.device)
        is_label = columns == labels[rows, None]
        gradients = torch.where(is_label, factor * (1.0 - p), -factor * p)
        grad_logits[rows, :width] = torch.where(incoming[rows, None] == 0, 0.0, gradients).to(
            logits.dtype
        )


def exact(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy in nats by torch's float64 log_softmax, [N] float64, differentiable.

    Tests measure the error of the aligned log-prob against this function.
    """
    log_softmax = torch.log_softmax(logits.double() / temperature, dim=1)
    entropy = torch.special.entr(log_softmax.exp()).sum(1)
    return log_softmax.gather(1, labels[:, None])[:, 0], entropy
