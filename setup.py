"""Builds the native extension of megatron_rl; metadata and entry points are in pyproject.toml.

With MEGATRON_RL_CUDA=1 the CUDA kernels are built, and it is an error if that is impossible; with 0
they are left out. If it is unset, they are built if there is a CUDA toolkit (CUDA_HOME, or nvcc on
the PATH) and torch was built with CUDA. It does not matter whether a GPU is visible.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "megatron_rl: expected torch in the environment that builds; run tools/bootstrap.sh, or "
        "install torch and then `pip install --no-build-isolation -e .`"
    ) from error

CSRC = Path("megatron_rl/csrc")
# Contracting a*b+c to one instruction would change the last bits; GCC does so even to intrinsics.
FLAGS = ["-O3", "-ffp-contract=off"]
# -fopenmp only for compiling: the OpenMP runtime is the one that torch has loaded.
FLAGS += ["-fopenmp", "-fvisibility=hidden", "-Wall"]
# GCC 12 warns about its own AVX-512 intrinsics, which use undefined values on purpose.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# As above: no contraction; and exact division, no flushed denormals (these two are defaults).
NVCC_FLAGS = ["-O3", "--fmad=false", "--prec-div=true", "--ftz=false"]
# Machine code for A100 and H100; PTX for later GPUs.
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "compute_90": "compute_90"}


def has_cuda() -> bool:
    """Whether to build the CUDA kernels; ends the build if they are required but impossible."""
    asked = os.environ.get("MEGATRON_RL_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"MEGATRON_RL_CUDA: expected 0, 1 or nothing, got {asked}")
    missing = ""
    if torch.version.cuda is None:  # CUDA_HOME is None then
        missing = f"a torch built with CUDA, which torch {torch.__version__} is not"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        missing = f"CUDA_HOME/bin/nvcc (CUDA_HOME is {CUDA_HOME})"
    if asked == "1" and missing:
        raise SystemExit(
            f"MEGATRON_RL_CUDA=1: expected what CUDA kernels are built with, missing is {missing}; "
            "install it, or set MEGATRON_RL_CUDA=0 for the C++ kernels alone"
        )
    if asked != "0" and missing:
        print(f"megatron_rl: no CUDA kernels, missing is {missing}")
    return asked != "0" and not missing


def native_extensions() -> list:
    """The extension: C++ kernels that choose an instruction set at run time, and CUDA kernels."""
    sources = sorted(CSRC.glob("*.cpp"))
    depends = [str(path) for path in sorted(CSRC.rglob("*.h"))]
    cpu = "C++ kernels for avx512, avx2 and portable"
    if not has_cuda():
        print(f"megatron_rl: building _C with {cpu}; no CUDA")
        return [
            CppExtension(
                "megatron_rl._C",
                [str(path) for path in sources],
                depends=depends,
                extra_compile_args=FLAGS,
            )
        ]
    names = ", ".join(ARCHITECTURES)
    print(f"megatron_rl: building _C with {cpu}, and CUDA {torch.version.cuda} kernels for {names}")
    sources += sorted(CSRC.glob("cuda/*.cpp")) + sorted(CSRC.glob("cuda/*.cu"))
    gencode = [f"-gencode=arch={virtual},code={name}" for name, virtual in ARCHITECTURES.items()]
    return [
        CUDAExtension(
            "megatron_rl._C",
            [str(path) for path in sources],
            depends=depends,
            define_macros=[("MEGATRON_RL_CUDA_ARCHITECTURES", f'"{" ".join(ARCHITECTURES)}"')],
            extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS + gencode},
        )
    ]


setup(
    ext_modules=native_extensions(),
    # With ninja on the PATH, sources are compiled in parallel.
    cmdclass={
        "build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    },
)
