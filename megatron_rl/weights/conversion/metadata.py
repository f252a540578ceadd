"""Reads `.metadata` of a distributed checkpoint, a pickle, without running code that it names.

A pickle may name any function to call. Here only the records that torch and Megatron describe a
checkpoint with are looked up, and the few types that they are made of. The paths that it holds must
be those of files in the checkpoint's own folder.

torch's own reader (torch/distributed/checkpoint/filesystem.py, `read_metadata`) and its planner of
a load (default_planner.py, `load_bytes`) unpickle whatever a checkpoint names. Whoever calls them,
directly or through Megatron, does so within `without_code`.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_rl.errors import DataError
from megatron_rl.weights.huggingface import check_inside

METADATA = ".metadata"
# The classes that a checkpoint is described with, by module.
RECORDS = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "torch.distributed._shard.metadata": {"ShardMetadata"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}
TYPES = {
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "tuple"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
READ_ERRORS = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError, ValueError)


class _Unpickler(pickle.Unpickler):
    """Looks up nothing but RECORDS, TYPES and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in TYPES:
            return getattr(importlib.import_module(module), name)
        if name in RECORDS.get(module, ()):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_records(path: Path) -> Any:
    """The records of torch's checkpoints that a file holds.

    Raises:
        READ_ERRORS and others: it is damaged, or names anything else.
    """
    return _Unpickler(io.BytesIO(path.read_bytes())).load()


@contextmanager
def without_code() -> Iterator[None]:
    """Within it, whatever reads a distributed checkpoint with torch unpickles only records and
    tensors; other contents of `.metadata` are a DataError, and of the files a
    pickle.UnpicklingError.
    """
    of_reader, of_planner = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    FileSystemReader.read_metadata = _read_metadata
    DefaultLoadPlanner.load_bytes = _load_bytes
    try:
        yield
    finally:
        FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes = of_reader, of_planner


def _read_metadata(reader: FileSystemReader, *_unused: Any, rank: int | None = None) -> Metadata:
    """`FileSystemReader.read_metadata`; `rank` if every rank has a checkpoint of its own."""
    name = METADATA if rank is None else f"__{rank}{METADATA}"
    metadata = read_metadata(Path(reader.path), name)
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def _load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes`."""
    key = read_item.dest_index.fqn
    found = torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[key], found)
    else:
        planner.state_dict[key] = found


def read_metadata(folder: Path, name: str = METADATA) -> Any:
    """What `.metadata` of a checkpoint says, after checking it.

    Args:
        name: of the file.

    Raises:
        DataError: it is missing, damaged, names code, or files outside the folder.
    """
    path = folder / name
    try:
        check_inside(path)
        metadata = read_records(path)
        files = {place.relative_path for place in metadata.storage_data.values()}
    except (*READ_ERRORS, KeyError, TypeError, IndexError, ImportError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder}: expected a distributed checkpoint of Megatron (format torch_dist, with a "
            f"file {name}), got {type(error).__name__}: {error}"
        ) from error
    for file in sorted(files, key=str):
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{path}: expected names of files in its folder, got {file!r}")
        if (folder / file).exists():
            check_inside(folder / file)
    return metadata
