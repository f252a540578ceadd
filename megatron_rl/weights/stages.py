"""Which decoder layers each part of a pipeline holds.

A pipeline of P ranks with V parts on each has P x V parts in layer order; rank p holds the parts p,
P + p, 2P + p and so on (Narayanan et al. 2021, "Efficient large-scale language model training on
GPU clusters", section 2.2). Without virtual stages V is 1, and a part is a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rl.errors import ConfigError


class Layout(Protocol):
    """The settings of `config.ParallelConfig` on which the position of a tensor depends."""

    @property
    def tensor(self) -> int:
        """The number of tensor-parallel ranks."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether the tensor-parallel ranks divide the positions of a row."""

    @property
    def expert(self) -> int:
        """The number of expert-parallel ranks, which divide the experts."""

    @property
    def expert_tensor(self) -> int:
        """The number of ranks that hold a shard of each expert."""

    @property
    def pipeline(self) -> int:
        """The number of pipeline ranks."""

    @property
    def virtual_pipeline(self) -> int:
        """The number of parts on each pipeline rank."""

    @property
    def stage_layers(self) -> Sequence[int]:
        """The decoder layers of each part; empty if all parts have the same number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineParts:
    """The parts of a pipeline, in layer order.

    Example of 10 layers on 2 ranks with 2 parts each: `PipelineParts(num_ranks=2, num_layers=(2, 3,
    3, 2))`; rank 0 holds the layers 0, 1, 5, 6 and 7.
    """

    num_ranks: int
    num_layers: tuple[int, ...]  # of each part

    @property
    def last(self) -> int:
        """The part with the final norm and the output layer."""
        return len(self.num_layers) - 1

    def first_layer(self, part: int) -> int:
        """The index of the part's first layer in the model."""
        return sum(self.num_layers[:part])

    def part_of(self, layer: int) -> int:
        """The part that holds a layer of the model."""
        return next(part for part in range(self.last + 1) if layer < self.first_layer(part + 1))

    def rank_of(self, part: int) -> int:
        """The pipeline rank that holds the part."""
        return part % self.num_ranks

    def of_rank(self, rank: int) -> range:
        """The parts of a pipeline rank."""
        return range(rank, len(self.num_layers), self.num_ranks)


def pipeline_parts(layout: Layout, num_layers: int) -> PipelineParts:
    """The parts of a model of `num_layers` decoder layers in this layout.

    Raises:
        ConfigError: the layers cannot be divided equally, or `parallel.stage_layers` has another
            sum.
    """
    num_parts = layout.pipeline * layout.virtual_pipeline
    layers = tuple(layout.stage_layers)
    if not layers:
        if num_layers % num_parts:
            keys = "parallel.pipeline"
            if layout.virtual_pipeline > 1:
                keys += " x parallel.virtual_pipeline"
            raise ConfigError(
                f"{keys}={num_parts} does not divide the model's {num_layers} layers: expected a "
                f"divisor of {num_layers}; change parallel.pipeline or set parallel.stage_layers"
            )
        layers = (num_layers // num_parts,) * num_parts
    if sum(layers) != num_layers:
        raise ConfigError(
            f"parallel.stage_layers: expected the model's {num_layers} layers in all, got "
            f"{sum(layers)}; change parallel.stage_layers"
        )
    return PipelineParts(num_ranks=layout.pipeline, num_layers=layers)
