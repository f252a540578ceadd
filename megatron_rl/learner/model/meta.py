"""[imports megatron] This rank's parts of a model on the meta device: names, shapes and dtypes of
all their parameters, and no memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

from megatron_rl.config.model import ModelConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import empty_parts, transformer_config
from megatron_rl.weights.geometry import Geometry

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn"}


class _OnMeta(TorchFunctionMode):
    """Makes torch's factories create tensors on the meta device. The context `torch.device("meta")`
    does not see the factories that layout/cpu_device.py has replaced.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def meta_parts(model: ModelConfig, geometry: Geometry, parallel: Parallel) -> list[GPTModel]:
    """The parts of the model that the rank of `parallel` holds, in layer order, without weights."""
    # Rotary frequencies are no parameters, and scaled ones would be computed.
    geometry = replace(geometry, has_rope_scaling=False, rope_theta=float(int(geometry.rope_theta)))
    transformer = transformer_config(geometry, parallel, model)
    # Transformer Engine's modules are told the device.
    is_told = transformer.transformer_impl == "transformer_engine"
    transformer = replace(
        transformer, perform_initialization=False, init_model_with_meta_device=is_told
    )
    with _OnMeta():
        return empty_parts(geometry, parallel, transformer, model.path)
