"""Which implementations compute this rank's layers and optimizer steps: what is installed, what the
settings ask for, and one line that says which answers.

Megatron's own layers and torch's AdamW are always there. Transformer Engine's layers and optimizer
and Apex's optimizer and fused gradient accumulation need a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

from megatron_rl.config.choices import AdamImplementation
from megatron_rl.config.learner import OptimizerConfig
from megatron_rl.config.model import ModelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.cpu_device import is_cpu_run

TRANSFORMER_ENGINE, APEX = "Transformer Engine", "Apex"
# Compiled parts of Apex; on PyPI there is another package of its name, without them.
APEX_OPTIMIZER, APEX_ACCUMULATION = "amp_C", "fused_weight_gradient_mlp_cuda"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it is installed, and there is a GPU."""
    return _is_usable("transformer_engine")


def has_apex_optimizer() -> bool:
    """Whether Apex's FusedAdam can be used: its compiled part is installed, and there is a GPU."""
    return _is_usable(APEX_OPTIMIZER) and _is_usable("apex")


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether the layers are Transformer Engine's, by the setting and by what is installed."""
    layers = model.kernels.layers
    return layers == "transformer_engine" or (layers == "auto" and has_transformer_engine())


def adam_of(choice: AdamImplementation) -> AdamImplementation:
    """The implementation of AdamW that answers to a choice; never auto."""
    if choice != "auto":
        return choice
    if has_transformer_engine():
        return "transformer_engine"
    return "apex" if has_apex_optimizer() else "torch"


def check_implementations(model: ModelConfig, optimizer: OptimizerConfig) -> None:
    """Raise ConfigError if something that the settings ask for is missing on this machine."""
    kernels = model.kernels
    asked: list[tuple[str, object, bool, str, Callable[[], bool]]] = [
        (
            "model.kernels.layers",
            kernels.layers,
            kernels.layers == "transformer_engine",
            TRANSFORMER_ENGINE,
            has_transformer_engine,
        ),
        (
            "model.kernels.attention",
            kernels.attention,
            kernels.attention != "auto",
            TRANSFORMER_ENGINE,
            has_transformer_engine,
        ),
        (
            "model.kernels.fp8",
            kernels.fp8,
            kernels.fp8 != "none",
            TRANSFORMER_ENGINE,
            has_transformer_engine,
        ),
        (
            "model.kernels.fused_rope",
            "true",
            kernels.fused_rope,
            TRANSFORMER_ENGINE,
            has_transformer_engine,
        ),
        (
            "model.kernels.fused_gradient_accumulation",
            "true",
            kernels.fused_gradient_accumulation,
            f"Apex's extension {APEX_ACCUMULATION}",
            lambda: _is_usable(APEX_ACCUMULATION),
        ),
        (
            "learner.optimizer.implementation",
            optimizer.implementation,
            optimizer.implementation == "transformer_engine",
            TRANSFORMER_ENGINE,
            has_transformer_engine,
        ),
        (
            "learner.optimizer.implementation",
            optimizer.implementation,
            optimizer.implementation == "apex",
            f"{APEX} with its optimizers ({APEX_OPTIMIZER})",
            has_apex_optimizer,
        ),
    ]
    for key, value, is_asked, what, is_there in asked:
        if is_asked and not is_there():
            lacks = "no GPU" if is_cpu_run() else "none installed"
            raise ConfigError(
                f"{key}={value}: expected a GPU and {what}, got {lacks}; install it, or change "
                f"{key}"
            )


def describe_implementations(model: ModelConfig, optimizer: OptimizerConfig) -> str:
    """What answers to the settings here, in one line, for example "layers of Transformer Engine
    2.20.2 in bfloat16 with FP8 (delayed), its fused norms and FusedAdam".
    """
    kernels = model.kernels
    layers = "layers of Megatron, norms of torch, packed attention"
    if uses_transformer_engine(model):
        layers = f"layers, fused norms and attention of {TRANSFORMER_ENGINE} {_version()}"
    adam = {
        "transformer_engine": f"FusedAdam of {TRANSFORMER_ENGINE}",
        "apex": f"FusedAdam of {APEX}",
        "torch": "fused AdamW of torch",
    }[adam_of(optimizer.implementation)]
    more = [
        text
        for is_on, text in (
            (kernels.fp8 != "none", f"FP8 ({kernels.fp8})"),
            (kernels.fused_rope, "fused rope"),
            (kernels.fused_gradient_accumulation, "fused gradient accumulation"),
            (kernels.deterministic, "deterministic"),
        )
        if is_on
    ]
    return "; ".join([f"{layers}, {model.dtype}", adam, *more])


def _is_usable(module: str) -> bool:
    return not is_cpu_run() and importlib.util.find_spec(module) is not None


def _version() -> str:
    try:
        return importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
