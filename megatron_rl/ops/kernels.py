"""The operators `torch.ops.megatron_rl.token_logprobs_*`, and log-probs as an autograd function.

On the CPU the operators are the C++ kernels of csrc/ (`extension.py` chooses the instruction set).
On a CUDA device they are the CUDA kernels if the extension was built with them; otherwise
`reference.py` runs there, with the same arithmetic but slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.ops import reference
from megatron_rl.ops.broken_rows import flag_of, note_broken_rows, raise_if_broken
from megatron_rl.ops.extension import cuda_architectures, instruction_set, load_extension
from megatron_rl.ops.node_layout import words_per_row
from megatron_rl.ops.vocab_parallel import VocabShard, gather_rows


@cache
def load() -> None:
    """Load the extension and register the Python part of its operators, once.

    Raises:
        ConfigError: see `extension.load_extension`.
    """
    load_extension()
    if not cuda_architectures():
        library = torch.library.Library("megatron_rl", "IMPL")
        library.impl("token_logprobs_nodes", _reference_nodes, "CUDA")
        library.impl("token_logprobs_finish", _reference_finish, "CUDA")
        library.impl("token_logprobs_gradient", _reference_gradient, "CUDA")
        _LIBRARIES.append(library)
    torch.library.register_fake("megatron_rl::token_logprobs_nodes", _fake_nodes)
    torch.library.register_fake("megatron_rl::token_logprobs_finish", _fake_finish)
    torch.library.register_fake("megatron_rl::token_logprobs_gradient", _fake_gradient)
    torch.library.register_fake("megatron_rl::empty_like_logits", _fake_empty_like)


_LIBRARIES: list[torch.library.Library] = []  # a registration lives as long as its Library


def backend(device: torch.device) -> str:
    """A description of the implementation of the operators on this device, for a run's log."""
    if device.type == "cpu":
        return f"C++ ({instruction_set()})"
    load_extension()
    architectures = cuda_architectures()
    if device.type == "cuda" and architectures:
        return f"CUDA ({', '.join(architectures)})"
    return "torch operations (no kernel for this device is built)"


def nodes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    edges: Sequence[int],
    rank: int,
    vocab_size: int,
    has_entropy: bool,
) -> torch.Tensor:
    """The words that this rank sends, [N, W] int32; see `reference.nodes`."""
    load()
    name = instruction_set()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return torch.ops.megatron_rl.token_logprobs_nodes(
        logits, labels, temperature, edges, rank, vocab_size, has_entropy, name
    )


def finish(
    words: torch.Tensor,
    labels: torch.Tensor,
    is_counted: torch.Tensor | None,
    edges: Sequence[int],
    vocab_size: int,
    has_entropy: bool,
    flag: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropy, N and S of the root, and the maximum of each row; see `reference.finish`.

    Args:
        is_counted: [N] bool, the rows whose breakage the flag may report; None: all of them.
        flag: [1] int64 of broken_rows.py, on a CUDA device; None on the CPU.
    """
    load()
    name = instruction_set()
    return torch.ops.megatron_rl.token_logprobs_finish(
        words, labels, edges, vocab_size, has_entropy, name, is_counted, flag
    )


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
    """Fill grad_logits [N, V], which may be the logits themselves; see `reference.gradient`."""
    load()
    name = instruction_set()
    torch.ops.megatron_rl.token_logprobs_gradient(
        logits if logits.stride(1) == 1 else logits.contiguous(),
        labels,
        incoming,
        exponent,
        total,
        temperature,
        first_column,
        vocab_size,
        grad_logits,
        name,
    )


def empty_like(logits: torch.Tensor) -> torch.Tensor:
    """Uninitialised contiguous memory of the shape and dtype of `logits`, for their gradient.

    On the CPU it may be the memory of an earlier gradient that is no longer in use.
    """
    load()
    return torch.ops.megatron_rl.empty_like_logits(logits)


class TokenLogprobs(torch.autograd.Function):
    """Log-probs, entropy, and the largest y of every row, each [N] float32.

    Only the log-probs have a gradient. The entropy is empty without `has_entropy`.
    """

    @staticmethod
    def forward(
        ctx, logits, labels, is_counted, temperature, shard, group, has_entropy, overwrite_logits
    ):
        """Arguments as in `token_logprobs`, after `arguments.without_ignored` and `shard_of`."""
        words = nodes(
            logits, labels, temperature, shard.edges, shard.rank, shard.vocab_size, has_entropy
        )
        logprobs, entropy, exponent, total, maximum = gather_and_finish(
            words, labels, is_counted, shard, group, has_entropy
        )
        ctx.save_for_backward(logits, labels, is_counted, exponent, total)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.overwrite_logits, ctx.is_overwritten = overwrite_logits, False
        ctx.mark_non_differentiable(entropy, maximum)
        return logprobs, entropy, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, _grad_entropy, _grad_maximum):
        """The gradient of the logits, from that of the log-probs [N] float32."""
        if ctx.is_overwritten:
            raise RuntimeError(
                "token_logprobs: expected one backward pass with overwrite_logits=True, got a "
                "second one; its logits are gone"
            )
        logits, labels, is_counted, exponent, total = ctx.saved_tensors
        grad_logits, ctx.is_overwritten = gradient_buffer(logits, ctx.overwrite_logits)
        gradient(
            logits,
            labels,
            zero_ignored(grad_logprobs, is_counted),
            exponent,
            total,
            ctx.temperature,
            ctx.shard.start,
            ctx.shard.vocab_size,
            grad_logits,
        )
        return grad_logits, *([None] * 7)


def gradient_buffer(logits: torch.Tensor, overwrite: bool) -> tuple[torch.Tensor, bool]:
    """Where the gradient of the logits is written, and whether that overwrites the logits."""
    if not overwrite:
        return empty_like(logits), False
    # Autograd then refuses any other node that saved these logits.
    torch.autograd.graph.increment_version(logits)
    return logits.detach(), True


def zero_ignored(values: torch.Tensor, is_counted: torch.Tensor | None) -> torch.Tensor:
    """[N] values with 0 in the rows that do not count; None: all rows count."""
    return values if is_counted is None else torch.where(is_counted, values, 0.0)


def gather_and_finish(
    words: torch.Tensor,
    labels: torch.Tensor,
    is_counted: torch.Tensor | None,
    shard: VocabShard,
    group: ProcessGroup | None,
    has_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the words [N, W] of all ranks and finish the rows; a collective over the group.

    Returns:
        Log-probs, entropy, N and S of the roots, and the largest y, as `finish`; 0 in rows that do
        not count.
    Raises:
        DivergenceError: broken logits, on the CPU; on a CUDA device the flag records them.
    """
    gathered = gather_rows(words, group)
    flag = flag_of(words.device) if words.device.type == "cuda" else None
    logprobs, entropy, exponent, total, maximum = finish(
        gathered, labels, is_counted, shard.edges, shard.vocab_size, has_entropy, flag
    )
    if maximum.device.type == "cpu":
        raise_if_broken(maximum, is_counted)
    logprobs = zero_ignored(logprobs, is_counted)
    entropy = zero_ignored(entropy, is_counted) if has_entropy else entropy
    return logprobs, entropy, exponent, total, maximum


def _reference_nodes(
    logits, labels, temperature, edges, rank, vocab_size, has_entropy, _instruction_set=""
):
    return reference.nodes(logits, labels, temperature, edges, rank, vocab_size, has_entropy)


def _reference_finish(
    words, labels, edges, vocab_size, has_entropy, _instruction_set="", is_counted=None, flag=None
):
    finished = reference.finish(words, labels, edges, vocab_size, has_entropy)
    if flag is not None:
        note_broken_rows(finished[4], labels, is_counted, vocab_size, flag)
    return finished


def _reference_gradient(*tensors_and_numbers):
    reference.gradient(*tensors_and_numbers[:9])


def _fake_nodes(
    logits, labels, temperature, edges, rank, vocab_size, has_entropy, instruction_set=""
):
    width = words_per_row(edges, vocab_size, has_entropy=has_entropy)
    return logits.new_empty((logits.shape[0], width), dtype=torch.int32)


def _fake_finish(
    nodes,
    labels,
    edges,
    vocab_size,
    has_entropy,
    instruction_set="",
    is_counted=None,
    flag=None,
):
    num_rows = labels.shape[0]

    def rows(count, dtype=torch.float32):
        return labels.new_empty((count,), dtype=dtype)

    entropy = rows(num_rows if has_entropy else 0)
    return rows(num_rows), entropy, rows(num_rows, torch.int32), rows(num_rows), rows(num_rows)


def _fake_gradient(
    logits,
    labels,
    incoming,
    exponent,
    sum,
    temperature,
    first_column,
    vocab_size,
    gradient,
    instruction_set="",
):
    return None


def _fake_empty_like(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
