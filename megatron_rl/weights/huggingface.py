"""Reads and writes Hugging Face checkpoints: `config.json`, the tokenizer's files, and safetensors
in one file or several.

Tensors are read in slices, so that a rank loads only its own shard. Nothing is unpickled, and an
index that points outside the checkpoint's folder is refused. `weights/agreement.py` compares the
tensors with `config.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rl.errors import DataError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TEMPLATE_NAME = "chat_template.jinja"
SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # of configs, tokenizers and templates
# Buffers that old checkpoints contain although no model reads them. vLLM computes them, its loader
# skips them (vllm/model_executor/models/utils.py:AutoWeightsLoader), and no learner publishes them.
DEAD_BUFFERS = (
    "rotary_pos_emb.inv_freq",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


class CheckpointReader:
    """Reads slices of the tensors in a checkpoint folder. A file is opened when it is first needed
    and remains open.

    Every method raises DataError if a file is missing or truncated, or if the index is malformed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._file_of = self._read_index()
        self._open: dict[Path, safe_open] = {}

    @property
    def names(self) -> list[str]:
        """The names of all tensors of the checkpoint."""
        return list(self._file_of)

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> torch.Tensor:
        """Read rows (`dimension` 0) or columns (1) from `start` to `stop`, or all with None."""
        tensor = self._slice(name)
        if dimension is None:
            return tensor[:]
        return tensor[start:stop] if dimension == 0 else tensor[:, start:stop]

    def check_whole(self) -> None:
        """Raise DataError unless there is one reading of the folder: every file that the index
        names is there, whole, and holds what the index says, no tensor is in two files, and no
        other safetensors file lies beside them, which vLLM would read too.
        """
        files = sorted(set(self._file_of.values()))
        for path in files:
            names = self._opened(path).keys()
            for name in names:
                if self._file_of.get(name) != path and not name.endswith(DEAD_BUFFERS):
                    named = self._file_of.get(name)
                    raise DataError(
                        f"{path}: expected only tensors that {INDEX_NAME} has in this file, got "
                        f"{name}, which it has in {named.name if named else 'no file'}: one of the "
                        "two is out of date; save the checkpoint again"
                    )
        others = sorted(set(self._folder.glob("*.safetensors")).difference(files))
        if others:
            named = INDEX_NAME if (self._folder / INDEX_NAME).is_file() else SINGLE_NAME
            raise DataError(
                f"{self._folder}: expected one set of weights, got {named} and beside it "
                f"{others[0].name}, which does not belong to it; delete or move the one that is "
                "not meant"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The number format of a tensor, as the header of its file has it: "F32", "BF16", "I8"."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise DataError(
                f"{self._folder}: expected a tensor named {name}, got none of that name in the "
                "checkpoint"
            )
        path = self._file_of[name]
        try:
            return self._opened(path).get_slice(name)
        except SafetensorError as error:
            raise DataError(
                f"{path}: expected to hold {name} as the index says, got: {error}"
            ) from error

    def _opened(self, path: Path) -> safe_open:
        if path not in self._open:
            if not path.is_file():
                raise DataError(
                    f"{path}: expected a shard that the checkpoint's index names, got no such file"
                )
            check_inside(path)
            try:
                self._open[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise DataError(
                    f"{path}: expected a whole safetensors file, got: {error}"
                ) from error
        return self._open[path]

    def _read_index(self) -> dict[str, Path]:
        index, single = self._folder / INDEX_NAME, self._folder / SINGLE_NAME
        if not index.is_file():
            if not single.is_file():
                raise DataError(
                    f"{self._folder}: expected {SINGLE_NAME} or {INDEX_NAME}, got neither"
                )
            check_inside(single)
            return dict.fromkeys(_names_in(single), single)
        try:
            files = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{index}: expected JSON with a weight_map, got {error!r}") from error
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise DataError(
                    f"{index}: expected names of files in the same folder, got {file!r}"
                )
        return {name: self._folder / file for name, file in files.items()}


def check_inside(path: Path) -> None:
    """Check that a file of a checkpoint is not a link out of its folder. In the hub's cache, the
    files of a snapshot are links to `blobs` of the same repository.

    Raises:
        DataError: it is one.
    """
    folder, target = path.parent.resolve(), path.resolve()
    allowed = (folder, folder.parent.parent / "blobs")
    if target.parent not in allowed:
        raise DataError(
            f"{path}: expected a file of the checkpoint, got a link to {target}, outside its "
            "folder; put the file itself there"
        )


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise DataError(f"{path}: expected a whole safetensors file, got: {error}") from error


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    like: str | Path,
    max_shard_bytes: int = 4 * 2**30,
    config_changes: Mapping[str, Any] = MappingProxyType({}),
    chat_template: str = "",
) -> None:
    """Write a Hugging Face checkpoint: the tensors, in shards, and a copy of the small files of
    `like`.

    The folder is written under a temporary name and renamed at the end, so that it is never
    incomplete. An existing folder is replaced.

    Args:
        tensors: name and full tensor, in the order of the checkpoint; each is kept on the CPU until
            its shard is full.
        like: the checkpoint whose config and tokenizer are copied.
        config_changes: keys of its config.json to change, with their new values.
        chat_template: to write in place of the one of `like`; "": keep that.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial.{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtypes = _write_tensors(partial, tensors, max_shard_bytes)
        finish_checkpoint(
            partial,
            dtypes,
            like=like,
            config_changes=config_changes,
            chat_template=chat_template,
        )
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # exists only after a failure
    shutil.rmtree(replaced, ignore_errors=True)


def finish_checkpoint(
    folder: Path,
    dtypes: Set[torch.dtype],
    *,
    like: str | Path,
    config_changes: Mapping[str, Any] = MappingProxyType({}),
    chat_template: str = "",
) -> None:
    """Add everything but the tensors to a new checkpoint; the arguments are those of
    `write_checkpoint`.

    Args:
        dtypes: of the tensors; if there is one, the config names it.
    """
    _copy_small_files(Path(like), folder)
    if len(dtypes) == 1:
        dtype = str(next(iter(dtypes))).removeprefix("torch.")
        config_changes = {"dtype": dtype, **config_changes}
    _change_config(folder / "config.json", config_changes)
    if chat_template:  # transformers prefers it to one in the tokenizer's config
        (folder / TEMPLATE_NAME).write_text(chat_template, encoding="utf-8")


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> set[torch.dtype]:
    """Write the shards, and an index if there are several. Returns the tensors' dtypes."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    dtypes: set[torch.dtype] = set()
    num_bytes = total_bytes = 0
    for name, tensor in tensors:
        if pending and num_bytes + tensor.nbytes > max_shard_bytes:
            _write_shard(folder, len(shards), pending, shards)
            pending, num_bytes = {}, 0
        pending[name] = tensor.detach().cpu().contiguous()
        dtypes.add(tensor.dtype)
        num_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    _write_shard(folder, len(shards), pending, shards)
    _name_shards(folder, shards, total_bytes)
    return dtypes


def _write_shard(
    folder: Path, number: int, tensors: dict[str, torch.Tensor], shards: list[list[str]]
) -> None:
    save_file(tensors, folder / f"shard-{number}", metadata={"format": "pt"})
    shards.append(list(tensors))


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, which contain the number of shards."""
    files = shard_names(len(shards))
    for number, file in enumerate(files):
        (folder / f"shard-{number}").rename(folder / file)
    write_index(folder, dict(zip(files, shards, strict=True)), total_bytes)


def shard_names(num_shards: int) -> list[str]:
    """The names of the safetensors files of a checkpoint."""
    if num_shards == 1:
        return [SINGLE_NAME]
    return [f"model-{n + 1:05d}-of-{num_shards:05d}.safetensors" for n in range(num_shards)]


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Write the index of several files; one file needs none.

    Args:
        shards: name of the file -> names of its tensors.
    """
    if len(shards) == 1:
        return
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))


def _copy_small_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if (
            path.is_file()
            and path.suffix in SMALL_SUFFIXES
            and not path.name.endswith(".index.json")
        ):
            shutil.copyfile(path, target / path.name)


def _change_config(path: Path, changes: Mapping[str, Any]) -> None:
    if changes:
        config = json.loads(path.read_text())
        if "dtype" in changes:
            config.pop("torch_dtype", None)  # the older name of dtype
        path.write_text(json.dumps(config | dict(changes), indent=2))
