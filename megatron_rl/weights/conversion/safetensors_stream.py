"""Writes a safetensors file tensor by tensor, so that never more than one of them is in memory.

The format (https://huggingface.co/docs/safetensors): the length of the header as 8 bytes, the
header in JSON with every tensor's dtype, shape and place, and the tensors. The order is that of the
safetensors library: larger dtypes first, then by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.errors import DataError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of a checkpoint. Example: `TensorSpec(name="lm_head.weight", dtype=torch.bfloat16,
    shape=(128, 64))`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a file of the tensors of `specs`, which `tensors` yields in any order.

    The file is written under another name, synced and renamed, so that it is whole if it exists.

    Raises:
        DataError: a tensor is not as its spec says, missing or yielded twice.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, place = {}, 0
    for spec in sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name)):
        begins[spec.name], end = place, place + spec.num_bytes
        header[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = {spec.name: spec for spec in specs}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name, tensor in tensors:
            spec = missing.pop(name, None)
            if spec is None or (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise DataError(
                    f"{path}: expected {spec or 'each tensor once'}, got {name} {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            file.seek(first + begins[name])
            file.write(
                memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            )
        if missing:
            raise DataError(f"{path}: expected a tensor {next(iter(missing))}, got none")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
