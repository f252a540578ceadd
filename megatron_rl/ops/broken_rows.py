"""Reports broken rows, which have no log-prob.

A row is broken if a logit is NaN or +inf, if its largest logit is out of range, or if its label is
not a token id of the vocabulary.

On the CPU a broken row raises at once. On a CUDA device that would make the host wait for the GPU,
so the kernel stores the number of the row in a flag on the device, and `check_broken_rows` raises
at a point where the host waits anyway.

A flag is one int64: NO_ROW, or 2 * row + (1 for broken logits, 0 for a broken label) of the first
broken row.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.ops.arithmetic import LARGEST_LOGIT

NO_ROW = 2**63 - 1

_FLAGS: dict[torch.device, torch.Tensor] = {}


def flag_of(device: torch.device) -> torch.Tensor:
    """[1] int64, the flag of a CUDA device, shared by all calls of this process on it."""
    if device not in _FLAGS:
        _FLAGS[device] = torch.full((1,), NO_ROW, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)  # the value must be there before other streams write it
    return _FLAGS[device]


def check_broken_rows(device: torch.device, place: str) -> None:
    """Raise for the first row that broke on this device since the last check, and clear the flag.

    Waits for the work on the device's current stream. Does nothing for the CPU.

    Args:
        device: with its index, as in `tensor.device`.
        place: what ran since the last check, for the error message.

    Raises:
        DivergenceError: broken logits. DataError: a label outside the vocabulary. Both name the
            row by its index within the call it belongs to.
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
    """Update the flag as the CUDA kernel does, in torch operations.

    Args:
        maximum: [N] float32, the largest y of every row. labels: [N] int64.
        is_counted: [N] bool, the rows that may be reported; None: all of them.
        flag: [1] int64, overwritten if an earlier row is broken than the one it holds.
    """
    is_of_logits = ~(maximum.abs() <= LARGEST_LOGIT)
    is_broken = is_of_logits | (labels < 0) | (labels >= vocab_size)
    if is_counted is not None:
        is_broken = is_broken & is_counted
    rows = torch.arange(len(maximum), device=maximum.device)
    codes = torch.where(is_broken, 2 * rows + is_of_logits, NO_ROW)
    flag.copy_(torch.cat([flag, codes]).amin(0, keepdim=True))


def raise_if_broken(maximum: torch.Tensor, is_counted: torch.Tensor | None) -> None:
    """Raise at once if a row is broken, for tensors on the CPU.

    Args:
        maximum: [N] float32, the largest y of every row.
        is_counted: [N] bool, the rows that must not be broken; None: all of them.

    Raises:
        DivergenceError: names the first broken row.
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
