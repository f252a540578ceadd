"""The two kinds of checkpoint that a conversion reads, behind one interface: whole Hugging Face
tensors, and the parts that a Megatron rank holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from megatron_rl.errors import DataError
from megatron_rl.weights.conversion.distributed import Box, DistributedReader
from megatron_rl.weights.conversion.keys import (
    Place,
    boxes_of_rank,
    find_place,
    whole_shape,
)
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.huggingface import CheckpointReader
from megatron_rl.weights.rules import TensorRule, hf_from_shard, hf_shapes, shard_from_hf


class Source(Protocol):
    """A checkpoint to convert."""

    def dtype(self, rule: TensorRule) -> torch.dtype:
        """The dtype of the rule's tensors."""

    def hf_tensors(self, rule: TensorRule) -> list[torch.Tensor]:
        """The rule's whole Hugging Face tensors, in the order of `rule.hf_names`."""

    def part_of_rank(self, rule: TensorRule, number: int, rank: int, size: int) -> torch.Tensor:
        """The part of the Megatron tensor in box `number` of `keys.boxes_of_rank`."""


class HuggingFaceSource:
    """A Hugging Face checkpoint."""

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        self._reader = CheckpointReader(folder)
        self._geometry = geometry

    def dtype(self, rule: TensorRule) -> torch.dtype:
        """The dtype of the rule's tensors; DataError if they differ."""
        dtypes = {self._reader.read(name, 0, 0, 1).dtype for name in rule.hf_names}
        if len(dtypes) > 1:
            raise DataError(
                f"expected one dtype of {', '.join(rule.hf_names)}, which are one tensor in "
                f"Megatron, got {sorted(map(str, dtypes))}"
            )
        return dtypes.pop()

    def hf_tensors(self, rule: TensorRule) -> list[torch.Tensor]:
        """The rule's whole tensors."""
        return [self._reader.read(name, None, 0, 0) for name in rule.hf_names]

    def part_of_rank(self, rule: TensorRule, number: int, rank: int, size: int) -> torch.Tensor:
        """The part of the Megatron tensor in a box of a rank."""
        if rule.kind == "gate_up":
            width = hf_shapes(rule, self._geometry)[number][0] // size
            return self._reader.read(rule.hf_names[number], 0, rank * width, (rank + 1) * width)
        return shard_from_hf(rule, self._geometry, self._reader.read, rank, size)


class MegatronSource:
    """A distributed checkpoint of Megatron, of any layout; its optimizer is not read."""

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        self._folder = folder
        self._reader = DistributedReader(folder)
        self._geometry = geometry

    def dtype(self, rule: TensorRule) -> torch.dtype:
        """The dtype of the rule's tensor."""
        return self._reader.dtype(self._place(rule).key)

    def hf_tensors(self, rule: TensorRule) -> list[torch.Tensor]:
        """The rule's whole tensors, without padding of the vocabulary."""
        shape = whole_shape(rule, self._geometry, 1)
        if rule.kind == "vocab":
            shape = (self._geometry.vocab_size, *shape[1:])
        place = self._place(rule)
        whole = self._reader.read(place.key, place.lead, Box(starts=(0,) * len(shape), sizes=shape))
        return hf_from_shard(rule, self._geometry, whole)

    def part_of_rank(self, rule: TensorRule, number: int, rank: int, size: int) -> torch.Tensor:
        """The part of the Megatron tensor in a box of a rank; rows beyond the vocabulary are 0."""
        place, box = self._place(rule), boxes_of_rank(rule, self._geometry, rank, size)[number]
        if rule.kind != "vocab":
            return self._reader.read(place.key, place.lead, box)
        rows = max(0, min(box.sizes[0], self._geometry.vocab_size - box.starts[0]))
        part = torch.zeros(box.sizes, dtype=self._reader.dtype(place.key))
        if rows:
            here = Box(starts=box.starts, sizes=(rows, *box.sizes[1:]))
            part[:rows] = self._reader.read(place.key, place.lead, here)
        return part

    def _place(self, rule: TensorRule) -> Place:
        place = find_place(rule, self._reader)
        if place is None:
            raise DataError(
                f"{self._folder}: expected the tensor {' or '.join(rule.megatron_names)} of the "
                "model in --model, got none; is this a checkpoint of that model?"
            )
        found = self._reader.shape(place.key)[len(place.lead) :]
        expected = whole_shape(rule, self._geometry, 1)
        is_padded = rule.kind == "vocab" and found[0] >= self._geometry.vocab_size
        if found[1:] != expected[1:] or not (is_padded or found == expected):
            raise DataError(
                f"{self._folder}: expected {place.key} of shape {list(expected)} in a layer, from "
                f"config.json of --model, got {list(found)}"
            )
        return place
