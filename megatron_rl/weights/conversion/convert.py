"""Converts a checkpoint to the other format, or to another layout of Megatron's, file by file.

The output is written under a hidden name beside its final one and renamed at the end. What an
interrupted conversion completed stays there, and the same conversion goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.weights.conversion.distributed import Box, NoState, Piece, write_files
from megatron_rl.weights.conversion.keys import (
    boxes_of_rank,
    extra_state_key,
    lead_shape,
    place_to_write,
    whole_shape,
)
from megatron_rl.weights.conversion.safetensors_stream import TensorSpec, write_tensors
from megatron_rl.weights.conversion.sources import Source
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.huggingface import finish_checkpoint, shard_names, write_index
from megatron_rl.weights.rules import TensorRule, hf_shapes, tensor_rules
from megatron_rl.weights.stages import Layout

RECORD = "conversion.json"


class Progress(Protocol):
    """Told after each file."""

    def __call__(self, num_bytes: int, total_bytes: int) -> None:
        """`num_bytes` of tensors are written, of `total_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a conversion writes, and from what. Example: `Output(folder=Path("out"),
    what={"source": "/models/a", "files": {"config.json": "9f3a"}, "max_shard_bytes": 4294967296})`.
    """

    folder: Path
    what: Mapping[str, Any]  # JSON; decides whether parts that are there are of this conversion

    @property
    def partial(self) -> Path:
        """The folder of the parts, until all are complete."""
        return self.folder.with_name(f".{self.folder.name}.partial")

    def start(self) -> None:
        """Create the folder of the parts, or go on with that of an interrupted conversion.

        Raises:
            ConfigError: the output exists, or the parts are those of another conversion.
        """
        if self.folder.exists():
            raise ConfigError(f"--output: expected a folder that does not exist, got {self.folder}")
        wanted = json.loads(json.dumps(dict(self.what)))
        record = self.partial / RECORD
        if not record.is_file():
            self.partial.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(wanted, indent=2))
        found = json.loads(record.read_text() or "{}")
        if found != wanted:
            differing = [key for key in wanted if found.get(key) != wanted[key]]
            raise ConfigError(
                f"{self.partial}: expected parts of this conversion, got those of one with another "
                f"{', '.join(differing)}; delete the folder, or change --output"
            )

    def finish(self) -> None:
        """Give the complete parts their final name."""
        (self.partial / RECORD).unlink()
        self.partial.rename(self.folder)


def to_huggingface(
    source: Source,
    geometry: Geometry,
    output: Output,
    *,
    like: Path,
    progress: Progress,
    max_shard_bytes: int = 4 * 2**30,
    chat_template: str = "",
) -> None:
    """Write a Hugging Face checkpoint; see `weights/huggingface.py` for the arguments."""
    output.start()
    specs = {
        name: (TensorSpec(name=name, dtype=source.dtype(rule), shape=shape), rule)
        for rule in tensor_rules(geometry)
        for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True)
    }
    shards = _shards([spec for spec, _ in specs.values()], max_shard_bytes)
    names = shard_names(len(shards))
    total, done = sum(spec.num_bytes for spec, _ in specs.values()), 0
    for file, shard in zip(names, shards, strict=True):
        if not (output.partial / file).is_file():
            wanted = [(spec.name, specs[spec.name][1]) for spec in shard]
            write_tensors(output.partial / file, shard, _hf_tensors(source, wanted))
        done += sum(spec.num_bytes for spec in shard)
        progress(done, total)
    by_file = {file: [spec.name for spec in shard] for file, shard in zip(names, shards)}
    write_index(output.partial, by_file, total)
    dtypes = {spec.dtype for spec, _ in specs.values()}
    finish_checkpoint(output.partial, dtypes, like=like, chat_template=chat_template)
    output.finish()


def _shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in order, divided into files of at most `max_bytes`, or of one tensor."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(each.num_bytes for each in shards[-1]) + spec.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(spec)
    return shards


def _hf_tensors(
    source: Source, wanted: Sequence[tuple[str, TensorRule]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for rule, names in groupby(wanted, key=lambda each: each[1]):
        tensors = dict(zip(rule.hf_names, source.hf_tensors(rule), strict=True))
        yield from ((name, tensors.pop(name)) for name, _ in names)


def to_megatron(
    source: Source, geometry: Geometry, layout: Layout, output: Output, *, progress: Progress
) -> None:
    """Write a distributed checkpoint of Megatron, with a file for each rank of the layout.

    Raises:
        ConfigError: the model does not allow the layout.
    """
    geometry.check_layout(layout)
    output.start()
    files = _files(source, geometry, layout)
    total = sum(piece.num_bytes for file in files for piece in file if isinstance(piece, Piece))
    done = 0
    for num_bytes in write_files(output.partial, files):
        done += num_bytes
        progress(done, total)
    output.finish()


def _files(source: Source, geometry: Geometry, layout: Layout) -> list[list[Piece | NoState]]:
    """The pieces of each file: by pipeline rank, then by rank of the layer's parallel groups."""
    pipeline = geometry.parts(layout)
    experts = (layout.expert, layout.expert_tensor) if geometry.experts else (1, 1)
    files = []
    for stage in range(layout.pipeline):
        rules = [
            rule
            for rule in tensor_rules(geometry)
            if pipeline.rank_of(rule.part(pipeline)) == stage
        ]
        for rank in range(max(layout.tensor, experts[0] * experts[1])):
            files.append([])
            for rule in rules:
                files[-1] += _pieces_of_rank(source, geometry, rule, rank, layout.tensor, experts)
    return files


def _pieces_of_rank(
    source: Source,
    geometry: Geometry,
    rule: TensorRule,
    rank: int,
    tensor: int,
    experts: tuple[int, int],
) -> list[Piece | NoState]:
    """What the file of a rank holds of a tensor.

    Args:
        experts: the numbers of expert-parallel and of expert tensor-parallel ranks.
    """
    size, is_held = tensor, rank < tensor
    if rule.expert is not None:
        per_rank = geometry.experts.num_experts // experts[0]
        holder, rank = divmod(rank, experts[1])
        size, is_held = experts[1], rule.expert // per_rank == holder
    if not is_held or (rule.kind == "replicated" and rank > 0):
        return []
    pieces: list[Piece | NoState] = _tensor_pieces(source, geometry, rule, rank, size)
    state = extra_state_key(rule, geometry)
    if state is not None and rank == 0:
        pieces.append(NoState(key=state))
    return pieces


def _tensor_pieces(
    source: Source, geometry: Geometry, rule: TensorRule, rank: int, size: int
) -> list[Piece | NoState]:
    place, dtype = place_to_write(rule), source.dtype(rule)
    shape = lead_shape(rule, geometry) + whole_shape(rule, geometry, size)
    return [
        Piece(
            key=place.key,
            dtype=dtype,
            shape=shape,
            box=Box(starts=place.lead + box.starts, sizes=(1,) * len(place.lead) + box.sizes),
            value=lambda number=number: source.part_of_rank(rule, number, rank, size),
        )
        for number, box in enumerate(boxes_of_rank(rule, geometry, rank, size))
    ]


def verify(made: Source, source: Source, geometry: Geometry, *, progress: Progress) -> None:
    """Compare every tensor of two checkpoints, byte by byte.

    Raises:
        DataError: naming the first tensor that differs.
    """
    rules = tensor_rules(geometry)
    for number, rule in enumerate(rules):
        pairs = zip(rule.hf_names, made.hf_tensors(rule), source.hf_tensors(rule), strict=True)
        for name, found, expected in pairs:
            if found.dtype != expected.dtype or not torch.equal(_bits(found), _bits(expected)):
                raise DataError(
                    f"--verify: expected {name} as in the source, got other bytes ({found.dtype} "
                    f"{list(found.shape)} instead of {expected.dtype} {list(expected.shape)}); "
                    "delete the output and convert again"
                )
        progress(number + 1, len(rules))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
