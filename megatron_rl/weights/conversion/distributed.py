"""Reads and writes the tensors of a distributed checkpoint of Megatron-Core (`torch_dist`), which
is one of `torch.distributed.checkpoint`: files `__<rank>_<n>.distcp` of tensors, and `.metadata`,
which says where each piece of each tensor lies.

The `.metadata` of a checkpoint is a pickle, which metadata.py reads without running code.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_rl.errors import DataError
from megatron_rl.weights.conversion.metadata import (
    METADATA,
    READ_ERRORS,
    read_metadata,
    read_records,
)

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A part of a tensor. Example: rows 4 to 7 of a matrix of 10 columns is `Box(starts=(4, 0),
    sizes=(4, 10))`.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tensor to write, computed when it is written. Example: `Piece(
    key="output_layer.weight", dtype=torch.bfloat16, shape=(256, 64), box=Box(starts=(0, 0),
    sizes=(128, 64)), value=lambda: torch.zeros(128, 64, dtype=torch.bfloat16))`.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole tensor
    box: Box
    value: Callable[[], torch.Tensor]  # of the box's sizes, or of them less leading dimensions of 1

    @property
    def num_bytes(self) -> int:
        """The size of the piece."""
        return torch.Size(self.box.sizes).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class NoState:
    """The entry of a module without extra state, which Megatron expects for each linear layer.
    Example: `NoState(key="decoder.layers.mlp.linear_fc1._extra_state/shard_0_2")`.
    """

    key: str


class DistributedReader:
    """Reads parts of the tensors of a checkpoint.

    Raises:
        DataError: the folder is no such checkpoint, or a file of it is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._storage = FileSystemReader(self._folder)
        self._metadata = read_metadata(self._folder)
        try:
            self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        except READ_ERRORS as error:
            raise DataError(
                f"{folder}: expected a distributed checkpoint of Megatron (format torch_dist, with "
                f"a file {METADATA}), got {type(error).__name__}: {error}"
            ) from error
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    @property
    def keys(self) -> list[str]:
        """The keys of all tensors, those of the optimizer included."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, lead: tuple[int, ...], box: Box) -> torch.Tensor:
        """A part of a tensor.

        Args:
            lead: the index in the leading dimensions: of the layer in tensors of all layers, of the
                expert in tensors of all experts.
            box: in the remaining dimensions; its sizes are the shape of the result.
        """
        target = torch.empty(box.sizes, dtype=self.dtype(key))
        items, num_found = [], 0
        for chunk in self._chunks_at(key, len(lead)).get(lead, []):
            item = _read_item(key, lead, box, chunk)
            if item is not None:
                items.append(item)
                num_found += torch.Size(item.lengths).numel()
        if num_found != target.numel():
            raise DataError(
                f"{self._folder}: expected the whole of {key}{list(lead)}, got {num_found} of "
                f"{target.numel()} numbers in {list(box.starts)} + {list(box.sizes)}"
            )
        try:
            self._storage.read_data(LoadPlan(items), _IntoTensor(target, len(lead)))
        except READ_ERRORS as error:
            raise DataError(
                f"{self._folder}: expected files that can be read, got {type(error).__name__}: "
                f"{error} in {key}"
            ) from error
        return target

    def _chunks_at(
        self, key: str, num_lead: int
    ) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """The stored chunks of a tensor by index in the leading dimensions."""
        found = self._chunks.get((key, num_lead))
        if found is None:
            found = self._chunks[(key, num_lead)] = {}
            for chunk in self._tensors[key].chunks:
                covered = [
                    range(chunk.offsets[n], chunk.offsets[n] + chunk.sizes[n])
                    for n in range(num_lead)
                ]
                for lead in itertools.product(*covered):
                    found.setdefault(lead, []).append(chunk)
        return found


def _read_item(
    key: str, lead: tuple[int, ...], box: Box, chunk: ChunkStorageMetadata
) -> ReadItem | None:
    """What to read of a stored chunk for a box; None if they do not overlap."""
    starts, sizes = (*lead, *box.starts), ((1,) * len(lead) + box.sizes)
    low = [max(a, b) for a, b in zip(starts, chunk.offsets, strict=True)]
    high = [
        min(a + n, b + m)
        for a, n, b, m in zip(starts, sizes, chunk.offsets, chunk.sizes, strict=True)
    ]
    lengths = [b - a for a, b in zip(low, high, strict=True)]
    if min(lengths, default=1) <= 0:
        return None
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key),
        dest_offsets=torch.Size(a - b for a, b in zip(low, starts, strict=True)),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size(a - b for a, b in zip(low, chunk.offsets, strict=True)),
        lengths=torch.Size(lengths),
    )


class _IntoTensor(LoadPlanner):
    """Tells the reader of torch where in one tensor each piece goes."""

    def __init__(self, target: torch.Tensor, num_lead: int) -> None:
        self._target = target.view((1,) * num_lead + target.shape)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._target
        for dimension, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dimension, start, size)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def set_up_planner(self, *_arguments: Any, **_options: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError


class _FromPieces(SavePlanner):
    """Computes each piece when the writer of torch asks for it."""

    def __init__(self, pieces: Sequence[Piece | NoState]) -> None:
        self._pieces = {_index(piece): piece for piece in pieces}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        piece = self._pieces[write_item.index]
        if isinstance(piece, NoState):
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        return piece.value().contiguous().view(piece.box.sizes)

    def set_up_planner(self, *_arguments: Any, **_options: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


def write_files(folder: Path, files: Sequence[Sequence[Piece | NoState]]) -> Iterator[int]:
    """Write a checkpoint, a file for each list of pieces; yields the bytes of each file's tensors
    when it is complete. Files that an earlier, interrupted call completed are not written again.

    Args:
        folder: exists; the pieces must be those of the earlier call.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, sync_files=True)
    items = [[_write_item(piece) for piece in pieces] for pieces in files]
    plans = writer.prepare_global_plan([SavePlan(each) for each in items])
    results = []
    for number, (pieces, plan) in enumerate(zip(files, plans, strict=True)):
        written = folder / f"written_{number}.pickle"
        if not written.is_file():
            result = writer.write_data(plan, _FromPieces(pieces)).wait()
            unfinished = written.with_suffix(".partial")
            unfinished.write_bytes(pickle.dumps(result))
            unfinished.rename(written)
        results.append(read_records(written))
        yield sum(piece.num_bytes for piece in pieces if isinstance(piece, Piece))
    writer.finish(Metadata(_described(files)), results)
    torch.save({"checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    for written in folder.glob("written_*.pickle"):
        written.unlink()


def _described(files: Sequence[Sequence[Piece | NoState]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for piece in itertools.chain.from_iterable(files):
        if isinstance(piece, NoState):
            entries[piece.key] = BytesStorageMetadata()
            continue
        entry = entries.setdefault(
            piece.key,
            TensorStorageMetadata(
                TensorProperties(dtype=piece.dtype), torch.Size(piece.shape), chunks=[]
            ),
        )
        entry.chunks.append(_chunk(piece))
    return entries


def _write_item(piece: Piece | NoState) -> WriteItem:
    if isinstance(piece, NoState):
        return WriteItem(_index(piece), WriteItemType.BYTE_IO)
    return WriteItem(
        _index(piece),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            _chunk(piece), TensorProperties(dtype=piece.dtype), torch.Size(piece.shape)
        ),
    )


def _index(piece: Piece | NoState) -> MetadataIndex:
    return MetadataIndex(piece.key, None if isinstance(piece, NoState) else piece.box.starts)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.box.starts), torch.Size(piece.box.sizes))
