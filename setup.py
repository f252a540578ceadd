"""Build of megatron_rl. Metadata, extras and entry points are in pyproject.toml; the native
extension is built here.

MEGATRON_RL_CUDA=1 asks for the CUDA kernels and fails where they cannot be built, 0 leaves them
out. Unset, they are built where there are a CUDA toolkit (CUDA_HOME, or nvcc on the PATH) and a
torch built with CUDA; whether a GPU is visible plays no part.
"""

import os
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
# A contracted a*b+c would change the last bits; GCC contracts even its own intrinsics.
FLAGS = ["-O3", "-ffp-contract=off"]
# Only to compile: the OpenMP runtime is the one that torch has loaded.
FLAGS += ["-fopenmp", "-fvisibility=hidden", "-Wall"]
# GCC 12 sees its own AVX-512 intrinsics use what is undefined on purpose.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# As above: no contraction, and neither fast division nor flushed denormals, which are the defaults.
NVCC_FLAGS = ["-O3", "--fmad=false", "--prec-div=true", "--ftz=false"]
# A100 and H100 in machine code; PTX for what comes after them.
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "compute_90": "compute_90"}


def has_cuda() -> bool:
    asked = os.environ.get("MEGATRON_RL_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"MEGATRON_RL_CUDA: expected 0, 1 or nothing, got {asked}")
    missing = ""
    if torch.version.cuda is None:  # torch looks for no CUDA_HOME then
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
    """The C++ kernels, one binary for every x86-64, which looks at the CPU when it is called; with
    them the CUDA kernels.
    """
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
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
