"""[imports modelopt] Calibrates the rounding of a model's projections on texts.

modelopt runs the Hugging Face model of the checkpoint on the texts and finds the largest input of
each projection, for static scales of activations, and AWQ's scales of input columns (Lin et al.
2023, arXiv 2306.00978), which make large columns of INT4 weights smaller where activations are
small.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_rl.errors import ConfigError

PACKAGES = ("modelopt", "pulp", "scipy")  # what modelopt.torch.quantization imports
SETTINGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
LARGEST_INPUT, COLUMN_SCALES = "largest_input", "column_scales"


def check_packages() -> None:
    """Raise ConfigError if modelopt, or what it imports, is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format: expected {', '.join(missing)}, for calibration, got none installed; "
            "pip install --no-deps -r requirements/quantize.txt"
        )


def calibrate(
    model_path: Path,
    kind: str,
    batches: Sequence[torch.Tensor],
    *,
    group_size: int,
    progress: Callable[[float], None],
) -> dict[str, torch.Tensor]:
    """Run the model on token ids.

    Args:
        kind: a key of SETTINGS.
        batches: [1, L] int64 each.
        group_size: input columns of one INT4 scale.
        progress: told the share of the passes that are done, 0 to 1.

    Returns:
        `<projection>.largest_input` [] float32, and with int4_awq `<projection>.column_scales` [I]
        float32, by which a projection's inputs are multiplied and its weight's columns divided.
    """
    check_packages()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as quantization
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto", local_files_only=True)
    settings = copy.deepcopy(getattr(quantization, SETTINGS[kind]))
    num_passes = len(batches) * (2 if kind == "int4_awq" else 1)
    if kind == "int4_awq":
        _set_group_size(settings, group_size)
    num_done = 0

    def run(module: torch.nn.Module) -> None:
        nonlocal num_done
        for ids in batches:
            module(ids)
            num_done += 1
            progress(min(1.0, num_done / num_passes))

    with torch.inference_mode(False), torch.no_grad():
        quantization.quantize(model, settings, run)
    found = {}
    for name, module in model.named_modules():
        inputs = getattr(module, "input_quantizer", None)
        if inputs is None or not name.endswith("_proj"):
            continue
        if getattr(inputs, "amax", None) is not None:
            found[f"{name}.{LARGEST_INPUT}"] = inputs.amax.detach().float().reshape(())
        if getattr(inputs, "pre_quant_scale", None) is not None:
            found[f"{name}.{COLUMN_SCALES}"] = inputs.pre_quant_scale.detach().float().clone()
    return found


def _set_group_size(settings: object, group_size: int) -> None:
    """Set modelopt's block size wherever its settings have one."""
    if isinstance(settings, dict):
        if "block_sizes" in settings and isinstance(settings["block_sizes"], dict):
            settings["block_sizes"][-1] = group_size
        for value in settings.values():
            _set_group_size(value, group_size)
    elif isinstance(settings, list):
        for value in settings:
            _set_group_size(value, group_size)
