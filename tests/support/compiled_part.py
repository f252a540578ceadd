"""A stand-in for what Transformer Engine has compiled, so that its Python layers can be built on a
machine without CUDA: their names and shapes, no arithmetic.

`install(folder)` must be called before anything imports `transformer_engine`, `megatron.core` or
this package's modules that need CUDA. `folder` holds the pure-Python wheel of Transformer Engine
and the few packages that it imports (`tests/support/transformer_engine.py` makes it).
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

COMPILED = "transformer_engine_torch"
DTYPES = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
BACKENDS = "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"
HOPPER = (9, 0)  # the compute capability that is claimed


class Placeholder:
    """Any enum, class or function of the compiled part: it has attributes and cannot be called."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.__name__ = name

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Placeholder(f"{self._name}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{COMPILED}.{self._name} was called, and there is no CUDA")

    def __int__(self) -> int:
        return hash(self._name) & 0xFFFF

    __index__ = __int__

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return self is other


def install(folder: Path) -> types.ModuleType:
    """Make `import transformer_engine` find the layers of `folder`, and torch claim a GPU to them;
    returns the package. Irrevocable: for a process of its own.
    """
    import torch

    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()  # while torch still says that there is no GPU
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no library is loaded
    sys.path.insert(0, str(folder))
    sys.modules[COMPILED] = _compiled_part()
    package = _package()
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: HOPPER
    torch.cuda.Stream = lambda *_, **__: torch.cuda.current_stream()
    package.pytorch = importlib.import_module("transformer_engine.pytorch")
    return package


def _compiled_part() -> types.ModuleType:
    module = types.ModuleType(COMPILED)
    module.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", BACKENDS, start=-1)
    module.DType = enum.IntEnum("DType", DTYPES, start=0)

    def placeholder(name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return module.__dict__.setdefault(name, Placeholder(name))

    module.__getattr__ = placeholder
    return module


def _package() -> types.ModuleType:
    """The package without its own `__init__`, which looks for the compiled part."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType("transformer_engine")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    package.__file__ = spec.origin
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    package.common = common
    package.__version__ = importlib.metadata.version("transformer_engine")
    return package
