"""The aligned log-prob in plain torch: the truth that the kernels are compared with, bit by bit.

    logprob = y[label] - log sum exp(y),   y = logits / temperature, over the true vocabulary

A sum of exponentials is a node (N, S), S * 2^N, with S in float32. Granules of 128 global columns
are summed against their own maximum, nodes are merged pairwise in a tree whose shape depends on
global positions alone, and the root is finished in float64. Each step is rounded once; csrc/ does
the same steps. Eager only: a compiler would fuse what is rounded apart here.

`nodes`, `finish` and `gradient` are also what runs on a CUDA device in a build without CUDA
kernels: the same steps, at a fraction of the speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rl.ops.node_layout import GRANULE, NodeLayout, node_layout, words_per_row

LARGEST_LOGIT = 2.0**21  # a row's maximum lies within plus or minus this
REACH = 80.0  # a column this far below its granule's maximum, or further, counts as this far
EMPTY_EXPONENT = -(2**30)  # of a node that holds nothing but -inf
DROPPED = 64  # 2^-64 of a sibling, or less, is dropped

LOG2E = float.fromhex("0x1.715476p+0")
LN2 = float.fromhex("0x1.62e430p-1")
MAGIC = float.fromhex("0x1.8p+23")  # adding it rounds to an integer, kept in the low bits
# exp(r) = 1 + r + c2 r^2 + ... + c5 r^5, highest first.
POLYNOMIAL = [
    *map(float.fromhex, ("0x1.106174p-7", "0x1.572c64p-5", "0x1.5557b6p-3", "0x1.fffdf8p-2")),
    1.0,
    1.0,
]
COLUMN_BITS = (4, 5, 6, 0, 1, 2, 3)  # the order in which a granule's columns are added
CHUNK_ELEMENTS = 2**24  # of logits at a time, which bounds the temporaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Nodes of [N] rows by any number of neighbours: three tensors [N, K]."""

    exponent: torch.Tensor  # N, int32
    sum: torch.Tensor  # S, float32
    weighted: torch.Tensor  # B: S's terms times (y - N ln 2), float32

    def __getitem__(self, columns: slice) -> Nodes:
        return Nodes(
            exponent=self.exponent[:, columns],
            sum=self.sum[:, columns],
            weighted=self.weighted[:, columns],
        )


def multiply_add(a: torch.Tensor, b: float | torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """float32 a * b + c, rounded once.

    In float64 the product is exact; the sum is rounded to odd, so that rounding it to float32 does
    not round a second time.
    """
    product = a.double() * (b.double() if isinstance(b, torch.Tensor) else b)
    c = c.double() if isinstance(c, torch.Tensor) else torch.full_like(product, c)
    total = product + c
    c_part = total - product
    error = (product - (total - c_part)) + (c - c_part)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    bits = bits + torch.where((error != 0) & (bits % 2 == 0), step, 0)
    return bits.view(torch.float64).float()


def power_of_half(k: torch.Tensor) -> torch.Tensor:
    """2^-k in float32 for int32 k of 0 to 126."""
    return ((127 - k) << 23).view(torch.float32)


def term(y: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """exp(y) * 2^-N, where offset is MAGIC - N."""
    t = multiply_add(y, LOG2E, offset)
    n = t - offset
    r = multiply_add(-n, LN2, y)
    f = torch.full_like(r, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        f = multiply_add(f, r, coefficient)
    return (f.view(torch.int32) + (t.view(torch.int32) << 23)).view(torch.float32)


def granules(y: torch.Tensor) -> Nodes:
    """The nodes of whole granules.

    Args:
        y: [N, K * 128] float32, with -inf where there is no column.
    """
    y = y.unflatten(1, (-1, GRANULE))
    maximum = y.amax(2)
    is_empty = maximum.isneginf()
    raised = maximum.clamp(min=-LARGEST_LOGIT)
    exponent = multiply_add(raised, LOG2E, MAGIC) - MAGIC
    y = torch.maximum(y, (raised - REACH)[..., None])
    e = term(y, (MAGIC - exponent)[..., None])
    weighted = e * multiply_add(-exponent[..., None].expand_as(y), LN2, y)
    # A broken row has no node: it is told by its maximum.
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
    """One node of 2^l neighbours, [N, 2^l] to [N, 1]."""
    while leaves.sum.shape[1] > 1:
        leaves = merge(leaves[0::2], leaves[1::2])
    return leaves


def logarithm(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm in float64 of positive normal numbers: x = 2^k q, log q by its series."""
    bits = x.view(torch.int64)
    k = (bits >> 52) - 1023
    q = ((bits & (2**52 - 1)) | (1023 << 52)).view(torch.float64)
    is_high = q > math.sqrt(2.0)
    q = torch.where(is_high, q * 0.5, q)
    k = k + is_high
    z = (q - 1.0) / (q + 1.0)
    w = z * z
    series = torch.full_like(w, 1.0 / 19)
    for i in range(17, 0, -2):
        series = series * w + 1.0 / i
    return k.double() * math.log(2.0) + 2.0 * (z * series)


def scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 logits / temperature by IEEE division."""
    y = logits.float()
    if temperature == 1.0:
        return y
    # A tensor on the device: by a Python number, CUDA multiplies with its rounded reciprocal.
    return y / torch.full((1,), temperature, dtype=torch.float32, device=y.device)


def nodes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    edges: Sequence[int],
    rank: int,
    vocab_size: int,
    has_entropy: bool,
) -> torch.Tensor:
    """What this rank sends.

    Args:
        logits: [N, V] float32, bfloat16 or float16: the columns edges[rank] to edges[rank + 1].
        labels: [N] int64, global.
        edges, rank, vocab_size: as `node_layout`.

    Returns:
        [N, W] int32, laid out as node_layout.py says.
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
    padded = torch.nn.functional.pad(y, (0, 1), value=0.0)  # a last column for other ranks' labels
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
    """The whole row from what all ranks sent.

    Args:
        words: [R, N, W] int32, of the ranks in order.

    Returns:
        logprobs [N] float32, entropy [N] float32 ([0] without entropy), and of the root N [N] int32
        and S [N] float32; the row's largest y [N] float32, NaN if it holds a NaN. Where that is not
        within +-2^21, log-prob and entropy are NaN.
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
    """Merge siblings as they come; then, from the right, nodes whose sibling is absent rise."""
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
    """Fill grad_logits [N, V], in the logits' dtype and perhaps the logits themselves.

    Args:
        incoming: [N] float32. A row where it is 0 gets +0, and so do columns from vocab_size on.
        exponent, total: N and S of the root, as `finish` returned them.
        first_column: global column of the shard's first one.
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
    """The float64 oracle: log-probs and entropy in nats, [N] float64, differentiable."""
    log_softmax = torch.log_softmax(logits.double() / temperature, dim=1)
    entropy = torch.special.entr(log_softmax.exp()).sum(1)
    return log_softmax.gather(1, labels[:, None])[:, 0], entropy
