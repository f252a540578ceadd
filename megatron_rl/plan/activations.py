"""The activations that a forward pass keeps for the backward pass, and the tensors of the loss.

They are counted operator by operator, as bytes of one position of a row, from what autograd saves
in Megatron's layers: with the layer spec of Transformer Engine on GPUs, with Megatron's own layers
and this package's packed attention on the CPU. h, f, q, k are the columns of the residual stream,
of the feed-forward layer, of the queries and of the keys on one rank; s is the size of a number.

    on the CPU       norms 2 x 4 h each (input and result in float32), inputs of the projections
                     h s, q s, h s, f s; heads' norms; attention q, k, v and its result as stacks
                     (2 q + 2 k) s; gated product 4 f s
    with TE          norm and projection keep 2 h s together; rows of queries, keys and values
                     (q + 2 k) s, rotated (q + k) s, attention's result q s; gated product 4 f s and
                     its projection's input f s

A mixture of experts keeps the same of each expert's product, and one more f s for its weight, for
every token that it is sent; and the copies of the tokens, h s each. Experts are taken to be
balanced: each rank's get as many tokens as its rows send. Of the E experts, a router keeps logits,
weights and choices, 9 E.

Sequence parallelism divides norms and the inputs of column-parallel projections over the
tensor-parallel ranks (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rl.plan.layout import ITEM_SIZES, ClusterLayout
from megatron_rl.weights.geometry import Geometry

DeviceType = Literal["cuda", "cpu"]
FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """The bytes that one decoder layer keeps for each position of a row, by what made them.

    Example of hidden 4, queries and keys of 4 columns, ffn 8 in bfloat16 with Transformer Engine:
    `LayerActivations(norms=40.0, attention=72.0, core_attention=12.0, feed_forward=80.0)`.
    """

    norms: float  # both norms of the residual stream, with the inputs of the projections after them
    attention: float  # queries, keys and values, up to and including their rotation
    core_attention: float  # what only attention itself keeps; selective recomputation drops it
    feed_forward: float  # of which selective recomputation keeps nothing

    @property
    def total(self) -> float:
        """Without recomputation."""
        return self.norms + self.attention + self.core_attention + self.feed_forward


def layer_activations(
    geometry: Geometry, layout: ClusterLayout, device: DeviceType
) -> LayerActivations:
    """What one decoder layer keeps for each position that a rank computes."""
    size = ITEM_SIZES[layout.dtype]
    num_heads = geometry.num_heads / layout.tensor
    num_groups = geometry.num_query_groups / layout.tensor
    query, key = num_heads * geometry.head_dim, num_groups * geometry.head_dim
    hidden = geometry.hidden_size / (layout.tensor if layout.is_sequence_parallel else 1)
    rotation = 4 * geometry.head_dim * size  # cosines and sines, of queries and of keys
    deviations = FLOAT32 * (num_heads + num_groups) if geometry.has_qk_norm else 0.0
    mixed, rotated, statistics = query + 2 * key, query + key, FLOAT32 * num_heads
    if device == "cuda":
        return LayerActivations(
            norms=2 * (2 * hidden * size + FLOAT32),
            attention=(mixed + rotated) * size + rotation + deviations,
            core_attention=query * size + statistics,
            feed_forward=_feed_forward(geometry, layout),
        )
    heads_norms = 0.0
    if geometry.has_qk_norm:
        # In float32 the keys' norm keeps a view of the projection's result instead of a copy.
        inputs = query + key if size < FLOAT32 else query + mixed
        heads_norms = FLOAT32 * (inputs + query + key) + deviations
    return LayerActivations(
        norms=2 * (2 * FLOAT32 * hidden + FLOAT32 + hidden * size),
        attention=heads_norms + query * size + rotation,
        core_attention=2 * rotated * size + statistics,
        feed_forward=_feed_forward(geometry, layout),
    )


def _feed_forward(geometry: Geometry, layout: ClusterLayout) -> float:
    """The bytes that a feed-forward layer, or the experts in its place, keep for each position."""
    size, experts = ITEM_SIZES[layout.dtype], geometry.experts
    if experts is None:
        return 5 * feed_forward_columns(geometry, layout) * size
    shared = experts.shared_ffn_hidden_size / layout.tensor
    own = feed_forward_columns(geometry, layout) - shared
    copies = _sent_tokens(geometry, layout) * layout.expert_tensor * geometry.hidden_size
    router = 9 * experts.num_experts / (layout.tensor if layout.is_sequence_parallel else 1)
    return (6 * own + copies + 5 * shared) * size + router


def _sent_tokens(geometry: Geometry, layout: ClusterLayout) -> float:
    """The tokens that a rank sends to experts for each position of a row."""
    return geometry.experts.num_chosen / (layout.tensor if layout.is_sequence_parallel else 1)


def feed_forward_columns(geometry: Geometry, layout: ClusterLayout) -> float:
    """The columns between the two projections that a rank computes for each position: of all the
    experts that it is sent to together.
    """
    experts = geometry.experts
    if experts is None:
        return geometry.ffn_hidden_size / layout.tensor
    # Each of the ETP ranks computes its share of the columns for the tokens of all of them.
    shared = experts.shared_ffn_hidden_size / layout.tensor
    return _sent_tokens(geometry, layout) * experts.ffn_hidden_size + shared


def kept_by_layer(geometry: Geometry, layout: ClusterLayout, device: DeviceType) -> float:
    """The bytes that a layer keeps for each position, with the layout's recomputation."""
    whole = layer_activations(geometry, layout, device)
    size = ITEM_SIZES[layout.dtype]
    if layout.recomputation == "none":
        return whole.total
    if layout.recomputation == "full":  # the layer's input
        return geometry.hidden_size * size / (layout.tensor if layout.is_sequence_parallel else 1)
    kept = whole.norms + whole.attention
    if device == "cpu":  # what attention takes: rotated queries and keys, and a view of the values
        columns = (2 * geometry.num_heads + 3 * geometry.num_query_groups) * geometry.head_dim
        kept += columns / layout.tensor * size
    return kept


def kept_by_head(geometry: Geometry, layout: ClusterLayout, device: DeviceType) -> float:
    """The bytes that the final norm and the input of the output layer take for each position."""
    hidden = geometry.hidden_size / (layout.tensor if layout.is_sequence_parallel else 1)
    size = ITEM_SIZES[layout.dtype]
    norm = 2 * FLOAT32 * hidden if device == "cpu" else hidden * size
    return norm + FLOAT32 + hidden * size


def backward_bytes(geometry: Geometry, layout: ClusterLayout, device: DeviceType) -> float:
    """The bytes for each position that the backward pass of one layer needs beside what is kept:
    what it computes again, and the gradients of the gated product and of the residual stream.
    Without recomputation, activations are freed while the gradients of the product are made.
    """
    whole, size = layer_activations(geometry, layout, device), ITEM_SIZES[layout.dtype]
    ffn, hidden = feed_forward_columns(geometry, layout), geometry.hidden_size
    if layout.recomputation == "none":
        return (ffn + 3 * hidden) * size
    gradients = (2 * ffn + 2 * hidden) * size
    if layout.recomputation == "full":
        return whole.total + gradients
    return max(whole.core_attention, whole.feed_forward) + gradients


def loss_bytes(
    geometry: Geometry, layout: ClusterLayout, *, has_entropy_gradient: bool = False
) -> float:
    """The bytes of the logits, and of their gradient, for each position that gets some. An entropy
    under gradient needs another copy (learner/passes/forward.py, `row_output`).
    """
    columns = geometry.padded_vocab_size(layout.tensor) / layout.tensor
    num_copies = 3 if has_entropy_gradient else 2
    return num_copies * columns * ITEM_SIZES[layout.dtype]
