"""What the package's sources may not do: run code from data, or read files that can hold code. And
what is refused, in one line: hostile checkpoints, settings and data.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from megatron_rl.config.file import load_config
from megatron_rl.data.candidate import Layout
from megatron_rl.data.files import FileSource
from megatron_rl.engine.token import token_in
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.process.folder import hold_folder
from megatron_rl.weights.conversion.distributed import DistributedReader
from megatron_rl.weights.conversion.metadata import METADATA, read_metadata, without_code
from megatron_rl.weights.huggingface import CheckpointReader

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_rl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
WITH_TOOLS = [*SOURCES, *sorted((ROOT / "tools").rglob("*.py"))]
# Objects between the ranks of one run over its own process groups.
UNPICKLES = {"megatron_rl/learner/layout/exchange.py"}
UNPICKLERS = {"load", "loads", "Unpickler"}
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "yaml.load",
    "yaml.unsafe_load",
    "marshal.loads",
    "shelve.open",
    "os.system",
    "os.popen",
}


def name_of(node: ast.expr) -> str:
    """`a.b` of an expression that is a name or an attribute of one."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return f"{module}.{name}"
    return ""


def found_in(source: str) -> Iterator[str]:
    """The forbidden calls of a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        module, _, function = name.rpartition(".")
        is_unpickling = module in ("pickle", "cloudpickle", "dill") and function in UNPICKLERS
        if name in FORBIDDEN or is_unpickling:
            yield name
        for keyword in node.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "weights_only" and is_false:
                yield f"{name}(weights_only=False)"
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                yield f"{name}({keyword.arg}=True)"
        if name == "torch.load" and not any(each.arg == "weights_only" for each in node.keywords):
            yield "torch.load without weights_only"


@pytest.mark.parametrize("path", WITH_TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_code_from_data(path: Path) -> None:
    found = list(found_in(path.read_text()))
    if str(path.relative_to(ROOT)) in UNPICKLES:
        found = [each for each in found if not each.startswith("pickle.")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "pickle.load(file)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_each_of_them_would_be_found(source: str) -> None:
    assert len(list(found_in(source))) == 1


class Owned:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def a_metadata(relative_path: str) -> Metadata:
    """Of a checkpoint with a tensor in one file."""
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16), torch.Size([4]), chunks=[chunk]
    )
    place = _StorageInfo(relative_path=relative_path, offset=0, length=8)
    return Metadata({"weight": tensor}, storage_data={MetadataIndex("weight", [0]): place})


def test_a_distributed_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(pickle.dumps(a_metadata("__0_0.distcp")))
    found = read_metadata(tmp_path)
    assert found == a_metadata("__0_0.distcp")


@pytest.mark.parametrize(
    ("hostile", "told"),
    [
        ("code", "it names posix.mkdir"),
        ("code of torch", "it names torch.distributed.checkpoint.filesystem.os"),
        ("..", r"expected names of files in its folder, got '\.\./secret'"),
        ("absolute", "expected names of files in its folder, got '/etc/shadow'"),
        ("link", "got a link to .*secret, outside its folder"),
        ("nothing", "got EOFError"),
        ("half", "expected a distributed checkpoint of Megatron"),
        ("list", "got AttributeError"),
    ],
)
def test_a_hostile_distributed_checkpoint_is_refused(
    hostile: str, told: str, tmp_path: Path
) -> None:
    folder, secret, mark = tmp_path / "checkpoint", tmp_path / "secret", tmp_path / "owned"
    folder.mkdir()
    secret.write_text("secret")
    whole = pickle.dumps(a_metadata("__0_0.distcp"))
    contents = {
        "code": pickle.dumps(Owned(mark)),
        "code of torch": b"ctorch.distributed.checkpoint.filesystem\nos\n.",
        "..": pickle.dumps(a_metadata("../secret")),
        "absolute": pickle.dumps(a_metadata("/etc/shadow")),
        "nothing": b"",
        "half": whole[: len(whole) // 2],
        "list": pickle.dumps([1]),
    }
    (folder / METADATA).write_bytes(contents.get(hostile, whole))
    if hostile == "link":
        (folder / "__0_0.distcp").symlink_to(secret)
    with pytest.raises(DataError, match=told) as caught:
        DistributedReader(folder)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


# What opens a socket of the host -> the modules that do so.
OPENERS = {
    "bind": {"engine/server.py", "doctor/network.py"},
    "create_server": {"process/loopback.py"},
    "TCPStore": {"process/loopback.py", "sync/groups/group.py"},
    "init_process_group": {
        "learner/layout/parallel.py",
        "learner/layout/simulated.py",
        "learner/model/bridged.py",  # on the loopback interface, with the line before it
    },
}
LISTENS = {"listen", "start_server", "HTTPServer", "TCPServer", "Server", "Listener", "run_app"}


def opened_by(source: str) -> set[str]:
    """The calls of a module that open a socket of the host, by name; and addresses of all
    interfaces.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rsplit(".", 1)[-1]
            found |= {name} & (OPENERS.keys() | LISTENS)
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::", "[::]"):
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_few_modules_open_a_socket_of_the_host(path: Path) -> None:
    """Each of those that do is tested for the address: tests/process/test_loopback.py,
    tests/test_serve.py, tests/doctor, tests/sync/transports, tests/learner/layout, and whole runs
    in tests/e2e/test_listeners.py.
    """
    own = str(path.relative_to(PACKAGE))
    assert opened_by(path.read_text()) == {name for name, of in OPENERS.items() if own in of}


def test_a_module_that_would_open_one_is_seen() -> None:
    for source in ("socket.create_server(('', 0))", "HTTPServer(x)", "host = '0.0.0.0'"):
        assert opened_by(source)


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """As Megatron writes them: objects beside the tensors are what torch.save makes of them."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    _save_state_dict(state, FileSystemWriter(folder), planner=planner, no_dist=True)


def load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """As Megatron does."""
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    _load_state_dict(state, FileSystemReader(folder), planner=planner, no_dist=True)
    return planner.state_dict


@pytest.mark.parametrize("is_protected", [False, True])
def test_torchs_reader_of_checkpoints_runs_no_code(is_protected: bool, tmp_path: Path) -> None:
    """Neither of `.metadata` nor of an object beside the tensors; each would without protection."""
    guard = without_code if is_protected else contextlib.nullcontext
    folder, of_metadata, of_object = (tmp_path / name for name in ("saved", "metadata", "object"))
    write_checkpoint(folder, {"sound": [1, 2], "hostile": Owned(of_object)})
    with guard():
        assert load(folder, {"sound": None}) == {"sound": [1, 2]}
        told = pytest.raises((CheckpointException, pickle.UnpicklingError), match="mkdir")
        with told if is_protected else contextlib.nullcontext():
            load(folder, {"hostile": None})
    (folder / METADATA).write_bytes(pickle.dumps(Owned(of_metadata)))
    told = pytest.raises((CheckpointException, AttributeError))
    with guard(), told:
        load(folder, {"sound": None})
    assert (of_metadata.exists(), of_object.exists()) == (not is_protected, not is_protected)


def write_index(folder: Path, file: str) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"weight": file}})
    )


@pytest.mark.parametrize(
    ("hostile", "told"),
    [
        ("..", r"expected names of files in the same folder, got '\.\./secret\.safetensors'"),
        ("absolute", "expected names of files in the same folder, got '/"),
        ("link", "got a link to .*, outside its folder"),
        ("a single link", "got a link to .*, outside its folder"),
        ("deep index", "expected JSON with a weight_map, got RecursionError"),
        ("header of a terabyte", "expected a whole safetensors file, got: .*header too large"),
        ("header of 4 GB", "expected a whole safetensors file, got: .*header too large"),
        ("header beyond the file", "expected a whole safetensors file, got: "),
        ("tensor beyond the file", "expected a whole safetensors file, got: "),
    ],
)
def test_a_hostile_hugging_face_checkpoint_is_refused(
    hostile: str, told: str, tmp_path: Path
) -> None:
    folder, secret = tmp_path / "checkpoint", tmp_path / "secret.safetensors"
    folder.mkdir()
    save_file({"weight": torch.zeros(4)}, secret)
    single = folder / "model.safetensors"
    header = b'{"weight":{"dtype":"F32","shape":[4000],"data_offsets":[0,16000]}}'
    contents = {
        "header of a terabyte": struct.pack("<Q", 2**40) + b"{}",
        "header of 4 GB": struct.pack("<Q", 2**32 + 1) + b"{}",
        "header beyond the file": struct.pack("<Q", 5_000) + b"{}",
        "tensor beyond the file": struct.pack("<Q", len(header)) + header + b"\0" * 16,
    }
    if hostile in contents:
        single.write_bytes(contents[hostile])
    elif hostile == "link":
        write_index(folder, "a.safetensors")
        (folder / "a.safetensors").symlink_to(secret)
    elif hostile == "a single link":
        single.symlink_to("../secret.safetensors")
    elif hostile == "deep index":
        deep = "[" * 200_000 + "]" * 200_000
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {deep}}}')
    else:
        write_index(folder, "../secret.safetensors" if hostile == ".." else str(secret))
    with pytest.raises(DataError, match=told) as caught:
        CheckpointReader(folder).shape("weight")
    assert "\n" not in str(caught.value)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"weight": torch.zeros(4)}, blobs / "c0ffee")
    (snapshot / "model.safetensors").symlink_to("../../blobs/c0ffee")
    assert CheckpointReader(snapshot).shape("weight") == (4,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # nine levels of nine aliases
        (
            "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"a{n}: &a{n} [{','.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 9)),
            "YAML node expansion exceeds",
        ),
        ("model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("model: !!python/name:os.system\n", "could not determine a constructor"),
        ("run_dir: ${oc.env:MEGATRON_RL_NO_SUCH_VARIABLE}\n", "run_dir"),
        ("model: " + "[" * 5_000 + "]" * 5_000 + "\n", "got too many levels"),
        ("? [a]\n: 1\n", "config.yaml"),
    ],
)
def test_hostile_settings_are_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("deep.jsonl", b'{"question": "1", "answer": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"),
        ("bytes.jsonl", bytes(range(256)) * 10),
        ("zeros.jsonl", bytes(10_000)),
        ("digits.jsonl", b'{"question": "1", "answer": ' + b"9" * 10_000 + b"}\n"),
        ("deep.json", b"[" * 200_000 + b"]" * 200_000),
        ("bytes.parquet", b"PAR1" + bytes(range(256)) * 10 + b"PAR1"),
        ("bytes.arrow", b"ARROW1\0\0" + b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(64)),
    ],
)
def test_hostile_data_is_refused(name: str, contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(DataError) as caught:
        FileSource(str(path), Layout(prompt_column="question", answer_column="answer"))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_runs_folder_and_token_are_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        hold_folder(tmp_path / "runs/a", "run_dir=runs/a")
        token_in(tmp_path / "runs/a/engine_token")
    finally:
        os.umask(before)
    modes = {
        each.name: stat.S_IMODE(each.stat().st_mode)
        for each in (tmp_path / "runs/a", *(tmp_path / "runs/a").iterdir())
    }
    assert modes == {"a": 0o700, ".in_use": 0o600, "engine_token": 0o600}
