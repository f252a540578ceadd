"""Every place of Megatron-Core that this package adapts is still there, in each pinned release."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rl.learner.layout import cpu_device, cpu_experts
from megatron_rl.learner.layout.cpu_device import RELEASES, SPOTS, Spot

REPOSITORY = Path(__file__).parents[3]
CACHE = REPOSITORY / ".cache" / "megatron_core"
PYTHON_OF = {"0.16.1": "3.11", "0.19.2": "3.12"}
# pip's words for a network that is not there, in its warnings before it gives up.
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    r"|Network is unreachable|Temporary failure in name resolution"
)
# Private names of Megatron-Core that files of learner/ set or rely on: (file, pattern, who).
PRIVATE_NAMES = (
    ("optimizer/__init__.py", r"^ +USING_PYTORCH_OPTIMIZER = True", "adam"),
    ("optimizer/__init__.py", r"if USING_PYTORCH_OPTIMIZER:", "adam"),
    ("optimizer/__init__.py", r"adam_cls = Adam$", "adam"),
    ("optimizer/distrib_optimizer.py", r"^ +HAVE_APEX_OR_TE = False", "adam"),
    ("optimizer/distrib_optimizer.py", r"^USING_APEX_OPTIMIZER = False", "adam"),
    ("optimizer/distrib_optimizer.py", r"if not HAVE_APEX_OR_TE:", "adam"),
    (
        "dist_checkpointing/strategies/filesystem_async.py",
        r"^_results_queue = None\n(.*\n)*def (_get|get)_write_results_queue",
        "checkpoint",
    ),
    (
        "models/common/embeddings/yarn_rotary_pos_embedding.py",
        r'if hasattr\(config, "yarn_rotary_scaling_factor"\):',
        "model",
    ),
    ("models/common/embeddings/rotary_pos_embedding.py", r"self\.inv_freq = ", "model"),
    ("transformer/transformer_layer.py", r"self\.mlp\)?, padding_mask=padding_mask", "experts"),
    ("transformer/transformer_block.py", r"packed_seq_params=packed_seq_params,", "experts"),
    ("transformer/moe/moe_layer.py", r"self\.moe_layer_recompute = \(", "experts"),
    (
        "transformer/moe/moe_layer.py",
        r"tensor_parallel\.checkpoint\(\n? +custom_forward",
        "experts",
    ),
    ("transformer/moe/router.py", r"probs, routing_map = self\.routing\(logits, ", "experts"),
    (
        "transformer/moe/token_dispatcher.py",
        r"self\.num_out_tokens = routing_map\.size\(0\) \* self\.config\.moe_router_topk",
        "experts",
    ),
    (
        "transformer/moe/token_dispatcher.py",
        r'self\.num_out_tokens = .*\.sum\(\)\n +self\._maybe_update_cuda_sync_point\("before_perm',
        "experts",
    ),
    (
        "transformer/moe/token_dispatcher.py",
        r"self\.tokens_per_expert = self\.preprocess\(self\.routing_map\)",
        "experts",
    ),
    ("tensor_parallel/layers.py", r'[\'"]allreduce[\'"], not ', "experts"),
    ("transformer/dot_product_attention.py", r"packed_seq_params is None", "attention"),
    (
        "distributed/finalize_model_grads.py",
        r'config\.qk_layernorm and \("q_layernorm" in name or "k_layernorm" in name\)',
        "export",
    ),
)


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest) -> tuple[str, Callable[[str], str]]:
    """A pinned release and a reader of its files below megatron/core/."""
    version = request.param
    if importlib.metadata.version("megatron-core") == version:
        installed = importlib.metadata.distribution("megatron-core")
        return version, lambda file: Path(
            installed.locate_file(f"megatron/core/{file}")
        ).read_text()
    wheel = zipfile.ZipFile(wheel_of(version))
    return version, lambda file: wheel.read(f"megatron/core/{file}").decode()


def wheel_of(version: str) -> Path:
    """The release's wheel, downloaded once; without a network the test is skipped, and says so."""
    pattern = f"megatron_core-{version}-*.whl"
    if not list(CACHE.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", f"megatron-core=={version}"]
        command += ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON_OF[version]]
        command += ["--retries", "1", "--timeout", "30", "--dest", str(CACHE)]
        done = subprocess.run(command, capture_output=True, text=True)
        output = done.stdout + done.stderr
        if done.returncode and NO_NETWORK.search(output):
            pytest.skip(f"no network to fetch megatron-core {version}: {output[-300:]}")
        assert done.returncode == 0, output
    return next(CACHE.glob(pattern))


def test_the_installed_release_is_a_pinned_one() -> None:
    assert importlib.metadata.version("megatron-core") in RELEASES
    pins = (REPOSITORY / "pyproject.toml").read_text()
    assert all(f"megatron-core=={version}" in pins for version in RELEASES)


@pytest.mark.parametrize(
    "spot", SPOTS + cpu_experts.SPOTS, ids=lambda spot: f"{spot.file}-{spot.answer}"
)
def test_every_adaptation_has_its_place(
    spot: Spot, release: tuple[str, Callable[[str], str]]
) -> None:
    version, read = release
    found = re.search(spot.pattern, read(spot.file)) is not None
    expected = version in spot.releases
    assert found == expected, f"{spot.file} of {version}: {spot.pattern}"
    assert callable(getattr(cpu_device if spot in SPOTS else cpu_experts, spot.answer))


@pytest.mark.parametrize(
    ("file", "pattern", "who"), PRIVATE_NAMES, ids=[f"{n[2]}-{n[1][:30]}" for n in PRIVATE_NAMES]
)
def test_every_private_name_is_there(
    file: str, pattern: str, who: str, release: tuple[str, Callable[[str], str]]
) -> None:
    version, read = release
    assert re.search(pattern, read(file), re.MULTILINE), f"{file} of {version}: learner/{who}.py"


def test_every_answer_is_asked_for() -> None:
    answers = {name for name in vars(cpu_device) if re.fullmatch(r"_\w+_(cpu|stay|cuda)", name)}
    answers = {name for name in answers if callable(getattr(cpu_device, name))} - {"_names_cuda"}
    assert answers == {spot.answer for spot in SPOTS}
    names = inspect.getsource(cpu_experts.run_experts_on_cpu)
    assert set(re.findall(r"^ +(_\w+)\(\)", names, re.MULTILINE)) == {
        spot.answer for spot in cpu_experts.SPOTS
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is adapted")
def test_the_cpu_answers_for_cuda() -> None:
    """In a process of its own, for what it changes stays changed."""
    script = """
import torch
from megatron_rl.learner.layout.cpu_device import run_on_cpu
run_on_cpu()
run_on_cpu()
for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.empty_like(torch.zeros(2), device=device).device.type == "cpu"
assert torch.zeros(2, device="meta").device.type == "meta"
assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
assert torch.zeros(2).cuda().device.type == "cpu"
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
assert torch.zeros(2).type(torch.float64).dtype is torch.float64
torch.cuda.synchronize()
torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first)
assert torch.equal(torch.cuda.default_generators[0].get_state(), torch.get_rng_state())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
