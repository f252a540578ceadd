"""[imports megatron] The parts of an optimizer, such as that of the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def chained_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that Megatron has chained, each of which holds parameters of its own; stubs,
    which hold none, are left out.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]
