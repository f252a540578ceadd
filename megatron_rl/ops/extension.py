"""Loads the native extension `megatron_rl._C` and chooses the CPU instruction set that it uses.

Environment variables:
    MEGATRON_RL_CPU_ISA: avx512, avx2 or portable; the default is the widest that the CPU has. The
        results have the same bits with each.
    MEGATRON_RL_CUDA: with 1, an extension without CUDA kernels is an error (and its build fails).
"""

from __future__ import annotations

import os
from functools import cache

import torch

from megatron_rl.errors import ConfigError

INSTRUCTION_SET_VARIABLE = "MEGATRON_RL_CPU_ISA"
CUDA_VARIABLE = "MEGATRON_RL_CUDA"


@cache
def load_extension() -> None:
    """Load the extension once, which defines the operators `torch.ops.megatron_rl.*`.

    Raises:
        ConfigError: the extension was not built, was built for another torch, or lacks the CUDA
            kernels that MEGATRON_RL_CUDA=1 asks for.
    """
    try:
        from megatron_rl import _C  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"megatron_rl._C: expected the built native extension, got {error}; run "
            "tools/bootstrap.sh, which builds it"
        ) from error
    if os.environ.get(CUDA_VARIABLE) == "1" and not cuda_architectures():
        raise ConfigError(
            f"{CUDA_VARIABLE}=1: expected a native extension with CUDA kernels, got one "
            "without; build it again where CUDA_HOME is set and torch has CUDA"
        )


def cuda_architectures() -> list[str]:
    """The GPU architectures that the loaded extension has kernels for, e.g. sm_80; often none."""
    return torch.ops.megatron_rl.cuda_architectures()


def instruction_set() -> str:
    """The instruction set used for CPU tensors: avx512, avx2 or portable.

    Raises:
        ConfigError: MEGATRON_RL_CPU_ISA names one that this CPU or this build does not have.
    """
    load_extension()
    supported = torch.ops.megatron_rl.instruction_sets()
    name = os.environ.get(INSTRUCTION_SET_VARIABLE) or supported[0]
    if name not in supported:
        raise ConfigError(
            f"{INSTRUCTION_SET_VARIABLE}: expected one of {', '.join(supported)} on this machine, "
            f"got {name}"
        )
    return name
