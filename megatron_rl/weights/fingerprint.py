"""A fingerprint of a Hugging Face checkpoint, which tells a resumed run that it was given another
model than before.

Small files (config, tokenizer, templates) are hashed whole. Of a file of weights, what is hashed is
its size, its header (the names and shapes of all tensors), and NUM_BLOCKS blocks of BLOCK_BYTES
spread evenly over it: 4 MiB of a file of any size, and a smaller file whole. Training changes
nearly every weight, so that another model differs in every block; an edit of a few weights between
the blocks is not seen.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from megatron_rl.errors import DataError
from megatron_rl.weights.huggingface import SMALL_SUFFIXES

NUM_BLOCKS = 64
BLOCK_BYTES = 64 * 2**10
_WEIGHTS = ".safetensors"


def model_fingerprint(folder: str | Path) -> dict[str, str]:
    """File name -> hash, of every file of a checkpoint that a run reads.

    Raises:
        DataError: a file cannot be read.
    """
    digests = {}
    try:
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and path.suffix in (*SMALL_SUFFIXES, _WEIGHTS):
                digests[path.name] = _digest(path)
    except OSError as error:
        raise DataError(
            f"{error.filename}: expected a readable file, got {error.strerror}"
        ) from error
    return digests


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        if path.suffix != _WEIGHTS or size <= NUM_BLOCKS * BLOCK_BYTES:
            while piece := file.read(2**20):
                digest.update(piece)
            return digest.hexdigest()
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        digest.update(file.read(min(header, size)))
        for block in range(NUM_BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1), os.SEEK_SET)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def distributed_fingerprint(folder: Path) -> dict[str, str]:
    """File name -> hash or size, of the files of a distributed checkpoint of Megatron. The hash of
    its metadata, and the sizes of the files of tensors.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        return {
            path.name: _digest(path) if path.name == ".metadata" else str(path.stat().st_size)
            for path in sorted(folder.iterdir())
            if path.name == ".metadata" or path.suffix == ".distcp"
        }
    except OSError as error:
        raise DataError(
            f"{error.filename}: expected a readable file, got {error.strerror}"
        ) from error
