"""Build of megatron_rl. Metadata, extras and entry points are in pyproject.toml; the native
extension is built here.
"""

import os
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
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


def native_extensions() -> list:
    """The C++ kernels: one binary for every x86-64, which looks at the CPU when it is called."""
    if os.environ.get("MEGATRON_RL_CUDA", "0") not in ("", "0"):
        raise SystemExit(
            "MEGATRON_RL_CUDA: expected 0 or nothing, as the CUDA kernels are not written yet; "
            f"got {os.environ['MEGATRON_RL_CUDA']}"
        )
    print("megatron_rl: building _C with C++ kernels for avx512, avx2 and portable; no CUDA")
    return [
        CppExtension(
            "megatron_rl._C",
            [str(path) for path in sorted(CSRC.glob("*.cpp"))],
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
            extra_compile_args=FLAGS,
        )
    ]


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
