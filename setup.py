"""Build of megatron_rl. Metadata, extras and entry points are in pyproject.toml; the native
extension is built here.
"""

from setuptools import setup


def native_extensions() -> list:
    """The C++ and CUDA kernels of megatron_rl/csrc that this machine can build."""
    return []


setup(ext_modules=native_extensions())
