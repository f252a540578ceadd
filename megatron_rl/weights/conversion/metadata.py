"""Reads `.metadata` of a distributed checkpoint, a pickle, without running code that it names.

A pickle may name any function to call. Here only the records of torch's checkpoints are looked up,
and the few types that they are made of. The paths that it holds must be those of files in the
checkpoint's own folder.
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_rl.errors import DataError
from megatron_rl.weights.huggingface import check_inside

METADATA = ".metadata"
# Modules whose classes a checkpoint is described with.
RECORDS = (
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed._shard.metadata",
    "megatron.core.dist_checkpointing.strategies.torch",
)
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
        if module in RECORDS and "." not in name:
            found = getattr(importlib.import_module(module), name)
            # defined there, and not something that the module has imported
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Any:
    """What `.metadata` of a checkpoint says, after checking it.

    Raises:
        DataError: it is missing, damaged, names code, or files outside the folder.
    """
    path = folder / METADATA
    try:
        check_inside(path)
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        files = {place.relative_path for place in metadata.storage_data.values()}
    except (*READ_ERRORS, KeyError, TypeError, IndexError, ImportError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder}: expected a distributed checkpoint of Megatron (format torch_dist, with a "
            f"file {METADATA}), got {type(error).__name__}: {error}"
        ) from error
    for file in sorted(files, key=str):
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{path}: expected names of files in its folder, got {file!r}")
        if (folder / file).exists():
            check_inside(folder / file)
    return metadata
