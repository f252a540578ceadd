"""What the tool writes: AWQ's scales change nothing but the weights' rounding, an interrupted call
goes on, and what is missing is told. With modelopt, the formats that are calibrated.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.weights.conversion import calibration
from megatron_rl.weights.conversion.calibration import COLUMN_SCALES, PACKAGES
from megatron_rl.weights.conversion.formats import Format, decompressed
from megatron_rl.weights.conversion.quantize import scaled
from tests.support.hub import empty_cache, fetched_model
from tools import quantize_checkpoint

MISSING = [name for name in PACKAGES if calibration.importlib.util.find_spec(name) is None]
needs_modelopt = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def quantize(model: Path, out: Path, kind: str, *options: object) -> int:
    arguments = [model, "-o", out, "--format", kind, "--group-size", 32, *options]
    return quantize_checkpoint.main([str(each) for each in arguments])


def loaded(model: Path, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model with other tensors."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    module.load_state_dict(tensors)
    return module.eval()


def dequantised(out: Path, kind: Format) -> dict[str, torch.Tensor]:
    stored = load_file(out / "model.safetensors")
    modules = {name.rsplit(".", 1)[0] for name in stored if "_proj." in name}
    tensors = {name: tensor for name, tensor in stored.items() if "_proj." not in name}
    for module in modules:
        of_module = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"{module}.")
        }
        tensors[f"{module}.weight"] = decompressed(kind, of_module, group_size=32)
    return tensors


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(3, 67).view(2, 32)).logits


def test_column_scales_are_moved_and_the_model_stays_the_same(sharp_checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(sharp_checkpoint / "model.safetensors")
    scales = {
        f"model.layers.{layer}.{part}.{name}.{COLUMN_SCALES}": 0.5
        + torch.rand(
            tensors[f"model.layers.{layer}.{part}.{name}.weight"].shape[1], generator=generator
        )
        for layer in range(2)
        for part, names in PROJECTIONS.items()
        for name in names
    }
    moved = {name: scaled(tensor, name, scales) for name, tensor in tensors.items()}
    changed = {
        name.split(".")[-2] for name in tensors if not torch.equal(moved[name], tensors[name])
    }
    assert changed == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    }
    expected = logits(loaded(sharp_checkpoint, tensors))
    torch.testing.assert_close(logits(loaded(sharp_checkpoint, moved)), expected, atol=2e-4, rtol=0)
    one = scaled(
        torch.ones(4, 2),
        "model.layers.0.mlp.down_proj.weight",
        {"model.layers.0.mlp.down_proj.column_scales": torch.tensor([2.0, 4.0])},
    )
    assert one[0].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("kind", ["fp8_channel", "fp8_block"])
def test_formats_without_calibration(kind: Format, sharp_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert quantize(sharp_checkpoint, out, kind) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert config["dtype"] == "float32"
    source = load_file(sharp_checkpoint / "model.safetensors")
    back = dequantised(out, kind)
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        largest = tensor.abs().max() * (16.1 / 448 if "_proj" in name else 0.0)
        assert (back[name] - tensor).abs().max() <= largest, name
    assert (out / "tokenizer.json").is_file() and not list(tmp_path.glob(".*"))
    assert quantize(sharp_checkpoint, out, kind) == 1  # not over it


def test_an_interrupted_call_goes_on(
    sharp_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = ("--max-shard-gib", 2e-5)
    assert quantize(sharp_checkpoint, tmp_path / "whole", "fp8_channel", *options) == 0
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 3
    from megatron_rl.weights.conversion import quantize as module

    save, written = module.save_file, []

    def save_two(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, **options)

    monkeypatch.setattr(module, "save_file", save_two)
    with pytest.raises(KeyboardInterrupt):
        quantize(sharp_checkpoint, out, "fp8_channel", *options)
    assert not out.exists()
    monkeypatch.setattr(module, "save_file", save)
    kept = {name: (tmp_path / ".out.partial" / name).stat().st_mtime_ns for name in files[:2]}
    assert quantize(sharp_checkpoint, out, "fp8_channel", *options) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_what_is_missing_is_told(
    sharp_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(calibration, "PACKAGES", ("no_such_package",))
    assert quantize(sharp_checkpoint, tmp_path / "out", "int8") == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "expected no_such_package" in told and "requirements/quantize.txt" in told
    monkeypatch.setattr(calibration, "PACKAGES", ())
    assert quantize(sharp_checkpoint, tmp_path / "out", "int8") == 1
    assert "--calibration: expected a file of texts" in capsys.readouterr().err
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"question": "1+1="}\n')
    assert quantize(sharp_checkpoint, tmp_path / "out", "int8", "--calibration", texts) == 1
    assert "line 1: expected an object with a column text" in capsys.readouterr().err
    assert not list(tmp_path.glob(".out*"))  # nothing that a call with another column would meet
    assert quantize_checkpoint.read_texts(texts, "question", 5) == ["1+1="]


@needs_modelopt
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4_awq", "nvfp4"])
def test_calibrated_formats(kind: Format, sharp_checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{n}+{n}={2 * n}\n" for n in range(8)))
    out = tmp_path / "out"
    assert quantize(sharp_checkpoint, out, kind, "--calibration", texts) == 0
    stored = load_file(out / "model.safetensors")
    scales = [
        tensor
        for name, tensor in stored.items()
        if name.endswith(("input_scale", "input_global_scale"))
    ]
    assert len(scales) == (0 if kind == "int4_awq" else 14)
    assert all(torch.isfinite(scale).all() and (scale > 0).all() for scale in scales)
    expected = logits(loaded(sharp_checkpoint, load_file(sharp_checkpoint / "model.safetensors")))
    found = logits(loaded(sharp_checkpoint, dequantised(out, kind)))
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < {"fp8": 0.1, "int8": 0.03, "int4_awq": 0.4, "nvfp4": 0.5}[kind]


def test_a_name_of_a_model_in_the_hub_s_cache(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = empty_cache(tmp_path, monkeypatch)
    fetched_model(hub, "mine/tiny", tiny_checkpoint)
    out = tmp_path / "out"
    options = ["-o", str(out), "--format", "fp8_channel"]
    assert quantize_checkpoint.main(["mine/tiny", *options]) == 0
    assert (out / "model.safetensors").is_file()
    capsys.readouterr()
    assert quantize_checkpoint.main(["mine/other", *options]) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert "hf download mine/other" in told
