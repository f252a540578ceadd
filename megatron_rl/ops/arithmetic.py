"""The rounded steps from which every part of the aligned log-prob is built, in plain torch.

Each function rounds exactly where its docstring says, so the kernels in csrc/ can follow it bit by
bit. Eager mode only: a compiler would fuse operations that must be rounded separately.
"""

from __future__ import annotations

import math

import torch

LARGEST_LOGIT = 2.0**21  # the maximum of a row must lie within plus or minus this
REACH = 80.0  # a column further than this below its granule's maximum is treated as this far below
DROPPED = 64  # a node smaller than its sibling by a factor of 2^64 or more is dropped

LOG2E = float.fromhex("0x1.715476p+0")
LN2 = float.fromhex("0x1.62e430p-1")
MAGIC = float.fromhex("0x1.8p+23")  # adding it rounds to an integer, kept in the low bits
# exp(r) = 1 + r + c2 r^2 + ... + c5 r^5, highest power first.
POLYNOMIAL = [
    *map(float.fromhex, ("0x1.106174p-7", "0x1.572c64p-5", "0x1.5557b6p-3", "0x1.fffdf8p-2")),
    1.0,
    1.0,
]
CHUNK_ELEMENTS = 2**24  # logits processed at a time, which bounds the temporaries


def multiply_add(a: torch.Tensor, b: float | torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """float32 a * b + c, rounded once.

    In float64 the product is exact. The sum is rounded to odd, so that rounding it to float32
    afterwards does not round a second time.
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
    """2^-k in float32 for int32 k from 0 to 126."""
    return ((127 - k) << 23).view(torch.float32)


def term(y: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """exp(y) * 2^-N in float32, where `offset` is MAGIC - N."""
    t = multiply_add(y, LOG2E, offset)
    n = t - offset
    r = multiply_add(-n, LN2, y)
    f = torch.full_like(r, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        f = multiply_add(f, r, coefficient)
    return (f.view(torch.int32) + (t.view(torch.int32) << 23)).view(torch.float32)


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
    # The divisor is a tensor on the device: given a Python number, CUDA would multiply by its
    # rounded reciprocal instead.
    return y / torch.full((1,), temperature, dtype=torch.float32, device=y.device)
