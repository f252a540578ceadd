"""Runs Megatron-Core on a machine without CUDA: every adaptation, with the place in Megatron-Core
that needs it.

Megatron-Core names the CUDA device in a few dozen places and compares the names of tensor types;
without a GPU these are redirected to the CPU. `run_on_cpu()` must be called before the first import
of `megatron.core`; it does nothing if a GPU is present. A test reads `SPOTS` and fails when a
pinned release no longer contains such a place, so that obsolete adaptations are noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")
RELEASES = ("0.16.1", "0.19.2")  # the releases of Megatron-Core that this package is pinned to


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """One place in Megatron-Core that assumes CUDA, and the function that adapts it.

    Example: `Spot(file="optimizer/clip_grads.py", pattern=r"device='cuda'",
    answer="_factories_on_cpu")`.
    """

    file: str  # path relative to megatron/core/
    pattern: str  # a regular expression that this place matches
    answer: str  # the function in this file that adapts it
    releases: tuple[str, ...] = RELEASES  # the releases that contain this place


SPOTS = (
    Spot(
        file="pipeline_parallel/schedules.py",
        pattern=r'torch\.zeros\(.*device="cuda"',
        answer="_factories_on_cpu",
    ),
    Spot(file="optimizer/optimizer.py", pattern=r"device='cuda'", answer="_factories_on_cpu"),
    Spot(
        file="tensor_parallel/layers.py",
        pattern=r"torch\.cuda\.current_device\(\)",
        answer="_cuda_is_the_cpu",
    ),
    Spot(
        file="tensor_parallel/random.py",
        pattern=r"torch\.cuda\.default_generators",
        answer="_generators_on_cpu",
    ),
    Spot(file="tensor_parallel/random.py", pattern=r"_lazy_call\(", answer="_cuda_is_the_cpu"),
    Spot(
        file="tensor_parallel/random.py",
        pattern=r"torch\.cuda\.get_rng_state\(",
        answer="_generators_on_cpu",
    ),
    Spot(
        file="pipeline_parallel/p2p_communication.py",
        pattern=r"torch\.cuda\.synchronize\(",
        answer="_cuda_is_the_cpu",
    ),
    Spot(
        file="distributed/param_and_grad_buffer.py",
        pattern=r"= torch\.cuda\.current_stream\(\)\n +waited_event_ids",
        answer="_cuda_is_the_cpu",
        releases=("0.19.2",),
    ),
    Spot(file="optimizer/clip_grads.py", pattern=r"device='cuda'", answer="_factories_on_cpu"),
    Spot(
        file="optimizer/optimizer.py",
        pattern=r"'torch\.cuda\.FloatTensor'",
        answer="_type_names_of_cuda",
    ),
    Spot(
        file="models/common/language_module/language_module.py",
        pattern=r"\.cuda\(\)",
        answer="_moves_stay",
    ),
)


def is_cpu_run() -> bool:
    """Whether no CUDA device is visible, so that the learner runs on the CPU."""
    return not torch.cuda.is_available()


def run_on_cpu() -> None:
    """Redirect CUDA calls to the CPU. Idempotent; has no effect if a GPU is present."""
    if not is_cpu_run() or getattr(torch.cuda, "_megatron_rl_on_cpu", False):
        return
    _factories_on_cpu()
    _generators_on_cpu()
    _cuda_is_the_cpu()
    _moves_stay()
    _type_names_of_cuda()
    torch.cuda._megatron_rl_on_cpu = True


def _names_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def _factories_on_cpu() -> None:
    """Make `torch.zeros(..., device="cuda")` and the other factories create CPU tensors."""

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*positional: Any, device: Any = None, **keywords: Any) -> torch.Tensor:
            return factory(*positional, device=CPU if _names_cuda(device) else device, **keywords)

        return call

    names = (
        "tensor",
        "as_tensor",
        "empty",
        "zeros",
        "ones",
        "full",
        "arange",
        "linspace",
        "rand",
        "randn",
        "randint",
    )
    for name in (*names, "empty_like", "zeros_like", "ones_like", "full_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


class _CpuGenerators:
    """Replaces `torch.cuda.default_generators`: returns the CPU's generator for every index."""

    def __getitem__(self, index: int) -> _CpuGenerators:
        return self

    def get_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


def _generators_on_cpu() -> None:
    torch.cuda.default_generators = _CpuGenerators()
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: (
        torch.get_rng_state()
    )
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed


class _CpuStream:
    """Replaces `torch.cuda.current_stream()`. On the CPU no work is ever pending."""

    def wait_event(self, event: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self, event: object = None) -> _CpuEvent:
        return _CpuEvent()


class _CpuEvent:
    """Replaces an event of a stream."""

    def synchronize(self) -> None: ...


CPU_STREAM = _CpuStream()


def _cuda_is_the_cpu() -> None:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    torch.cuda.current_device = lambda: CPU
    torch.cuda.current_stream = lambda *_, **__: CPU_STREAM
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda._lazy_call = lambda callback, **_: callback()
    torch.cuda._lazy_init = torch.cuda.synchronize = nothing
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing


def _moves_stay() -> None:
    """Make `.cuda()` return the tensor or module unchanged."""
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self


def _type_names_of_cuda() -> None:
    """Make CPU tensors report CUDA type names, because the mixed-precision optimizers compare type
    names with `torch.cuda.FloatTensor`.
    """
    tensor_type = torch.Tensor.type

    def type_of(self: torch.Tensor, *positional: Any, **keywords: Any) -> Any:
        if positional or keywords:
            return tensor_type(self, *positional, **keywords)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_of
