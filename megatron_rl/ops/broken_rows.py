"""Rows that have no log-prob, because a logit is NaN or +inf, the largest one is out of reach, or
the label lies outside the vocabulary: how they are told.

On the CPU they raise at once. On a CUDA device the CPU would have to wait for the GPU: there the
kernel leaves the row's number in a flag on the device, and `check_broken_rows` raises for it where
the CPU waits anyway.

A flag is one int64: 2 * row + (1: its logits, 0: its label) of the first broken row, or NO_ROW.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.ops.reference import LARGEST_LOGIT

NO_ROW = 2**63 - 1

_FLAGS: dict[torch.device, torch.Tensor] = {}


def flag_of(device: torch.device) -> torch.Tensor:
    """[1] int64, the flag of a CUDA device, all calls of a process on it together."""
    if device not in _FLAGS:
        _FLAGS[device] = torch.full((1,), NO_ROW, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)  # once: other streams may write to it
    return _FLAGS[device]


def check_broken_rows(device: torch.device, place: str) -> None:
    """Raise for the first broken row of the calls on this device since the last check, and forget
    it. Waits for the work on the current stream; nothing on a CPU.

    Args:
        device: as a tensor has it, with its index.
        place: what ran since then, for the message.

    Raises:
        DivergenceError: broken logits. DataError: a label outside the vocabulary. Both name the
            row, counted from the first one of its own call.
    """
    if device not in _FLAGS:
        return
    first = int(_FLAGS[device])
    if first == NO_ROW:
        return
    _FLAGS[device].fill_(NO_ROW)
    row, is_of_logits = divmod(first, 2)
    if is_of_logits:
        raise DivergenceError(
            f"{place}: logits of row {row}: expected numbers and -inf, the largest within "
            f"+-{LARGEST_LOGIT:.0f}, got others; look for NaN in the weights and the hidden states"
        )
    raise DataError(
        f"{place}: label of row {row}: expected a token id of the vocabulary, got another one; do "
        "tokenizer and model have the same vocabulary?"
    )


def note_broken_rows(
    maximum: torch.Tensor,
    labels: torch.Tensor,
    is_counted: torch.Tensor | None,
    vocab_size: int,
    flag: torch.Tensor,
) -> None:
    """What the CUDA kernel does to the flag, in torch operations."""
    is_of_logits = ~(maximum.abs() <= LARGEST_LOGIT)
    is_broken = is_of_logits | (labels < 0) | (labels >= vocab_size)
    if is_counted is not None:
        is_broken = is_broken & is_counted
    rows = torch.arange(len(maximum), device=maximum.device)
    codes = torch.where(is_broken, 2 * rows + is_of_logits, NO_ROW)
    flag.copy_(torch.cat([flag, codes]).amin(0, keepdim=True))


def raise_if_broken(maximum: torch.Tensor, is_counted: torch.Tensor | None) -> None:
    """At once, for tensors on a CPU.

    Args:
        maximum: [N] float32, the largest y of every row.
        is_counted: [N] bool; the others may be broken.
    """
    is_broken = ~(maximum.abs() <= LARGEST_LOGIT)
    if is_counted is not None:
        is_broken &= is_counted
    if not bool(is_broken.any()):
        return
    row = int(is_broken.int().argmax())
    largest = float(maximum[row])
    if math.isnan(largest) or largest == math.inf:
        found = "NaN or +inf"
    elif largest == -math.inf:
        found = "nothing but -inf"
    else:
        found = f"a largest one of {largest:g} after division by the temperature"
    raise DivergenceError(
        f"logits of row {row}: expected numbers and -inf, the largest within "
        f"+-{LARGEST_LOGIT:.0f}, got {found} ({int(is_broken.sum())} of {is_broken.numel()} rows "
        "are broken); look for NaN in the weights and the hidden states"
    )
