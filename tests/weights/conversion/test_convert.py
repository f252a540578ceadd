"""Conversion through pairs of layouts and back gives the same bytes; interrupted, it goes on; it
needs memory for less than a file; what it cannot convert is told in one line.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.weights.conversion.distributed import Box, DistributedReader
from tests.support.models import write_small_model
from tests.support.ranks import run_module
from tools import convert_checkpoint

PAIRS = {
    "tp2-pp4": (["--tensor", "2"], ["--pipeline", "4"]),
    "tp4pp2-tp1": (["--tensor", "4", "--pipeline", "2"], []),
    "pp2vpp2-tp2": (["--pipeline", "2", "--virtual-pipeline", "2"], ["--tensor", "2"]),
    "uneven-tp2pp2": (
        ["--pipeline", "2", "--stage-layers", "1", "3"],
        ["--tensor", "2", "--pipeline", "2"],
    ),
}
EXPERT_PAIRS = {
    "ep4-tp2": (["--expert", "4"], ["--tensor", "2"]),
    "tp2-ep2etp2": (["--tensor", "2"], ["--expert", "2", "--expert-tensor", "2"]),
    "pp2ep2-ep8": (["--pipeline", "2", "--expert", "2"], ["--expert", "8"]),
    "etp4-pp4": (["--expert-tensor", "4"], ["--pipeline", "4"]),
}
CASES = [
    *(("dense", pair) for pair in PAIRS),
    ("tied", "tp4pp2-tp1"),
    *(("moe", pair) for pair in EXPERT_PAIRS),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("dense", "tied", "moe"):
        write_small_model(folder / kind, kind)
    return folder


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(each) for each in arguments])


@pytest.mark.parametrize(("kind", "pair"), CASES)
def test_round_trips_give_the_same_bytes(
    kind: str, pair: str, models: Path, tmp_path: Path
) -> None:
    model, (first, second) = models / kind, (PAIRS | EXPERT_PAIRS)[pair]
    one, two, back = tmp_path / "one", tmp_path / "two", tmp_path / "back"
    assert convert(model, "-o", one, *first, "--verify") == 0
    assert convert(one, "-o", two, "--to", "megatron", "--model", model, *second) == 0
    assert convert(two, "-o", back, "--model", model, "--verify") == 0
    assert (back / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    assert (back / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_file_for_each_rank_holds_its_part(models: Path, tmp_path: Path) -> None:
    assert convert(models / "dense", "-o", tmp_path / "out", "--tensor", 2, "--pipeline", 2) == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    distcp = [f"__{rank}_0.distcp" for rank in range(4)]
    assert files == [".metadata", *distcp, "common.pt", "metadata.json"]
    reader = DistributedReader(tmp_path / "out")
    # 128 tokens are padded to 128 x TP; gate and up of a layer are 192 rows each
    assert reader.shape("embedding.word_embeddings.weight") == (256, 64)
    assert reader.shape("decoder.layers.mlp.linear_fc1.weight") == (4, 384, 64)
    source = load_file(models / "dense" / "model.safetensors")
    up = reader.read(
        "decoder.layers.mlp.linear_fc1.weight", (3,), Box(starts=(192, 0), sizes=(192, 64))
    )
    assert torch.equal(up, source["model.layers.3.mlp.up_proj.weight"])
    padding = reader.read(
        "embedding.word_embeddings.weight", (), Box(starts=(128, 0), sizes=(128, 64))
    )
    assert not padding.any()


@pytest.mark.parametrize("direction", ["megatron", "huggingface"])
def test_a_killed_conversion_goes_on(direction: str, models: Path, tmp_path: Path) -> None:
    model, out = models / "dense", tmp_path / "out"
    arguments: list[object] = [model, "-o", out, "--tensor", 2, "--pipeline", 4]
    first = tmp_path / ".out.partial" / "written_0.pickle"
    if direction == "huggingface":
        assert convert(model, "-o", tmp_path / "meg") == 0
        arguments = [tmp_path / "meg", "-o", out, "--model", model, "--max-shard-gib", 1e-5]
        assert convert(*(tmp_path / "whole" if each == out else each for each in arguments)) == 0
        first = first.with_name(min((tmp_path / "whole").glob("*.safetensors")).name)
    run_module(
        "tests.weights.conversion.slow_disk",
        *arguments,
        ranks=0,
        must_succeed=False,
        kill_when=first,
    )
    assert first.is_file() and not out.exists()
    completed = {path: path.stat().st_mtime_ns for path in first.parent.glob(f"*{first.suffix}")}
    assert len(completed) < 8
    stays = {
        path.name if direction == "huggingface" else f"__{path.stem.split('_')[1]}_0.distcp"
        for path in completed
    }
    before = {name: (first.parent / name).stat().st_mtime_ns for name in stays}
    assert convert(*arguments, "--verify") == 0
    assert {name: (out / name).stat().st_mtime_ns for name in stays} == before
    assert not [path for path in out.iterdir() if "written" in path.name or "json.p" in path.name]


def test_peak_memory_is_below_one_and_a_half_files(models: Path, tmp_path: Path) -> None:
    """Of a checkpoint of 92 MiB, in files of 22 MiB, either way."""
    model = tmp_path / "model"
    write_small_model(model, "large")
    shard = 22 * 2**20
    assert (model / "model.safetensors").stat().st_size > 3.5 * shard
    module = "tests.weights.conversion.peak_memory"
    arguments = [model, "-o", tmp_path / "meg", "--tensor", 2, "--pipeline", 2]
    told = run_module(module, *arguments, ranks=0).stdout
    largest = max(path.stat().st_size for path in (tmp_path / "meg").glob("*.distcp"))
    assert largest > shard
    assert 2**20 < int(told.splitlines()[-1]) < 1.5 * shard
    arguments = [tmp_path / "meg", "-o", tmp_path / "back", "--model", model]
    told = run_module(module, *arguments, "--max-shard-gib", shard / 2**30, ranks=0).stdout
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert 2**20 < int(told.splitlines()[-1]) < 1.5 * shard


def test_what_cannot_be_converted_is_told(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = models / "dense", tmp_path / "out"

    def refused(*arguments: object) -> str:
        assert convert(*arguments) == 1
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1
        return told

    assert "expected a checkpoint, with config.json" in refused(tmp_path, "-o", out)
    assert "--output: expected a folder, got none" in refused(model)
    assert "tensor=3 does not divide" in refused(model, "-o", out, "--tensor", 3)
    assert "expert=2: expected 1" in refused(model, "-o", out, "--expert", 2)
    assert "--to: expected megatron" in refused(model, "-o", out, "--to", "huggingface")
    assert not out.exists() and not list(tmp_path.glob(".out*/*.distcp"))
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)

    assert convert(model, "-o", out, "--tensor", 2) == 0
    assert "expected a folder that does not exist" in refused(model, "-o", out)
    back = tmp_path / "back"
    assert "--model: expected the Hugging Face folder" in refused(out, "-o", back)
    wide = tmp_path / "wide"
    wide.mkdir()
    config = json.loads((model / "config.json").read_text()) | {"intermediate_size": 384}
    (wide / "config.json").write_text(json.dumps(config))
    assert "of shape [768, 64] in a layer" in refused(out, "-o", back, "--model", wide)
    shutil.rmtree(tmp_path / ".back.partial")

    (tmp_path / ".back.partial").mkdir()
    (tmp_path / ".back.partial" / "conversion.json").write_text('{"source": "/models/other"}')
    assert "with another source" in refused(out, "-o", back, "--model", model)
    shutil.rmtree(tmp_path / ".back.partial")
    with (out / "__1_0.distcp").open("r+b") as file:
        file.truncate(20_000)
    assert "expected files that can be read" in refused(out, "-o", back, "--model", model)
    assert not back.exists()


def test_verify_finds_a_changed_byte(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish = convert_checkpoint.to_huggingface

    def change(*arguments: object, **options: object) -> None:
        finish(*arguments, **options)
        path = tmp_path / "back" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1e-3
        save_file(tensors, path)

    monkeypatch.setattr(convert_checkpoint, "to_huggingface", change)
    assert convert(models / "dense", "-o", tmp_path / "meg") == 0
    back = ["-o", tmp_path / "back", "--model", models / "dense", "--verify"]
    assert convert(tmp_path / "meg", *back) == 1
    assert "expected model.layers.1.self_attn.k_proj.weight as in" in capsys.readouterr().err
