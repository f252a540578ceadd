"""The operators `torch.ops.megatron_rl.token_logprobs_*` behind `logprobs.py`.

On the CPU they are the C++ kernels of csrc/, in the widest instruction set that the CPU has; the
environment variable MEGATRON_RL_CPU_ISA (avx512, avx2 or portable) asks for another one, with the
same bits. On a CUDA device they are the CUDA kernels where the extension was built with them, and
`reference.py` otherwise, with the same arithmetic and slow; MEGATRON_RL_CUDA=1, which makes the
build fail without them, makes their absence an error here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch

from megatron_rl.errors import ConfigError
from megatron_rl.ops import reference
from megatron_rl.ops.broken_rows import note_broken_rows
from megatron_rl.ops.node_layout import words_per_row

INSTRUCTION_SET_VARIABLE = "MEGATRON_RL_CPU_ISA"
CUDA_VARIABLE = "MEGATRON_RL_CUDA"


@cache
def load() -> None:
    """Load the extension and register what is Python's part of the operators, once.

    Raises:
        ConfigError: an extension that was not built, or was built for another torch, or without
            the CUDA kernels that MEGATRON_RL_CUDA=1 asks for.
    """
    try:
        from megatron_rl import _C  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"megatron_rl._C: expected the built native extension, got {error}; run "
            "tools/bootstrap.sh, which builds it"
        ) from error
    if not torch.ops.megatron_rl.cuda_architectures():
        if os.environ.get(CUDA_VARIABLE) == "1":
            raise ConfigError(
                f"{CUDA_VARIABLE}=1: expected a native extension with CUDA kernels, got one "
                "without; build it again where CUDA_HOME is set and torch has CUDA"
            )
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


def instruction_set() -> str:
    """The instruction set that CPU tensors are worked on with: avx512, avx2 or portable.

    Raises:
        ConfigError: MEGATRON_RL_CPU_ISA names one that this CPU or this build does not have.
    """
    load()
    supported = torch.ops.megatron_rl.instruction_sets()
    name = os.environ.get(INSTRUCTION_SET_VARIABLE) or supported[0]
    if name not in supported:
        raise ConfigError(
            f"{INSTRUCTION_SET_VARIABLE}: expected one of {', '.join(supported)} on this machine, "
            f"got {name}"
        )
    return name


def backend(device: torch.device) -> str:
    """What computes on this device, in words for a run's log."""
    if device.type == "cpu":
        return f"C++ ({instruction_set()})"
    load()
    architectures = torch.ops.megatron_rl.cuda_architectures()
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
    """`reference.nodes`: [N, W] int32."""
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
    """`reference.finish`: log-probs, entropy, N and S of the root, the row's maximum.

    Args:
        is_counted: [N] bool, rows that the flag may tell of; None: all.
        flag: of broken_rows.py, on a CUDA device; None on the CPU.
    """
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
    """`reference.gradient`: fills grad_logits [N, V], which may be logits."""
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
    """Memory for a gradient of the logits, contiguous; on the CPU perhaps that of the last one."""
    load()
    return torch.ops.megatron_rl.empty_like_logits(logits)


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
