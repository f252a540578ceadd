"""What sync/engine_side/ uses of vLLM without its being a public interface is still there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

RELOAD = "model_executor/model_loader/reload"
MOE = "model_executor/layers/fused_moe"
INT8 = "model_executor/kernels/linear/scaled_mm/cpu.py"
EMBEDDING = "model_executor/layers/vocab_parallel_embedding.py"
TRANSFER = "distributed/weight_transfer"
# (file, pattern, who)
PRIVATE_NAMES = (
    (f"{RELOAD}/layerwise.py", r"^LOADING_LAYERS: WeakSet", "reload"),
    (f"{RELOAD}/layerwise.py", r"^def get_layerwise_info\(layer: ", "reload"),
    (f"{RELOAD}/layerwise.py", r"^def _place_kernel_tensors\(layer: .*, info: ", "reload"),
    (f"{RELOAD}/layerwise.py", r"model\._original_do_torchao_reload = ", "reload"),
    (f"{RELOAD}/layerwise.py", r"^def initialize_layerwise_reload\(model: ", "plugin"),
    (f"{RELOAD}/layerwise.py", r"^def finalize_layerwise_reload\(", "plugin"),
    (f"{RELOAD}/types.py", r"def can_load\(self\) -> bool:", "reload"),
    (f"{RELOAD}/types.py", r"def reset\(self\):", "reload"),
    (INT8, r"^class CPUInt8ScaledMMLinearKernel\(", "reload"),
    (INT8, r"w_q_name, w_s_name, .* = self\.layer_param_names", "reload"),
    (INT8, r"self\.dnnl_handler = ops\.create_onednn_scaled_mm\(", "reload"),
    (EMBEDDING, r"^class ParallelLMHead\(", "reload"),
    (EMBEDDING, r"dispatch_cpu_unquantized_gemm\(layer, remove_weight=False\)", "reload"),
    (f"{MOE}/unquantized_fused_moe_method.py", r"self\.moe_kernel = ", "reload"),
    (
        f"{MOE}/unquantized_fused_moe_method.py",
        r"self\.moe_kernel\.fused_experts\.process_weights_after_loading\(layer\)",
        "reload",
    ),
    (f"{TRANSFER}/factory.py", r"^    _registry: dict\[str, ", "plugin"),
    (f"{TRANSFER}/factory.py", r"^    def register_engine\(", "plugin"),
    (f"{TRANSFER}/base.py", r"def parse_update_info\(self, update_dict: ", "plugin"),
    ("config/parallel.py", r"^    data_parallel_index: int", "plugin"),
    (
        "model_executor/model_loader/mtp_validation.py",
        r"^def disable_mtp_completeness_check\(\)",
        "plugin",
    ),
    ("model_executor/models/utils.py", r'"rotary_emb\.inv_freq": None', "plugin"),
)


@pytest.mark.parametrize(
    ("file", "pattern", "who"), PRIVATE_NAMES, ids=[f"{n[2]}-{n[1][:30]}" for n in PRIVATE_NAMES]
)
def test_every_private_name_is_there(file: str, pattern: str, who: str) -> None:
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    found = re.search(pattern, (folder / file).read_text(), re.MULTILINE)
    assert found, f"vllm/{file}: needed by sync/engine_side/{who}.py"


def test_every_import_from_vllm_is_from_a_file_that_is_there() -> None:
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    sources = Path(__file__).parents[3] / "megatron_rl" / "sync" / "engine_side"
    modules = set()
    for who in ("reload", "plugin"):
        modules |= set(
            re.findall(r"from vllm\.([\w.]+) import", (sources / f"{who}.py").read_text())
        )
    assert len(modules) >= 5
    for module in modules:
        path = folder.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
