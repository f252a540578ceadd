"""Makes torch and the libraries below it choose algorithms that give the same bits each time.

torch's own operations on a GPU that add in the order in which threads arrive, such as `index_add_`
of floating-point numbers, are replaced by ordered ones, or refused if there is none. cuBLAS keeps
one workspace a stream, Transformer Engine leaves out attention kernels whose backward pass adds
with atomics, and NCCL reduces along a fixed ring. On a CPU all of it is so anyway.
"""

from __future__ import annotations

import os

import torch

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}


def use_deterministic_algorithms() -> None:
    """To be called before CUDA is used; variables that are set already keep their values, but for
    Transformer Engine's, on which Megatron's layers insist.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
