"""A learner and a layout that need no process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rl.observe.metrics import AllReduce
from megatron_rl.records import Sample


@dataclass(kw_only=True)
class FakeParallel:
    """One rank of a layout: the head of its replica and its last stage, unless told otherwise.

    `others` is what the other replicas add to every sum; `log` notes the collectives.
    """

    rank: int = 0
    dp_rank: int = 0
    dp_size: int = 1
    world_size: int = 1
    tp_rank: int = 0
    is_replica_head: bool = True
    is_last_stage: bool = True
    others: float = 0.0
    head_value: Any = None  # what the head sends, on a rank that is none
    first_value: Any = None  # what rank 0 sends, on another rank
    other_values: list[Any] = field(default_factory=list)  # of the other ranks, gathered
    log: list[str] = field(default_factory=list)

    @property
    def is_row_writer(self) -> bool:
        return self.is_last_stage and self.tp_rank == 0

    def from_replica_head(self, value: Any) -> Any:
        self.log.append("from_replica_head")
        return value if self.is_replica_head else self.head_value

    def from_last_stage(self, value: Any) -> Any:
        self.log.append("from_last_stage")
        return value

    def from_first_rank(self, value: Any) -> Any:
        self.log.append("from_first_rank")
        return value if self.rank == 0 else self.first_value

    def from_all_ranks(self, value: Any) -> list[Any]:
        self.log.append("from_all_ranks")
        return [value, *self.other_values]

    def any_rank(self, is_true: bool) -> bool:
        self.log.append("any_rank")
        return is_true

    def first_problem(self, problem: str) -> str:
        self.log.append("first_problem")
        return next(filter(None, [problem, *self.other_values]), "")

    def barrier(self) -> None:
        self.log.append("barrier")

    def share(self, count: int) -> tuple[int, int]:
        start = count * self.dp_rank // self.dp_size
        return start, count * (self.dp_rank + 1) // self.dp_size - start

    def reducer(self) -> AllReduce:
        def reduce(values: torch.Tensor, operation: str) -> torch.Tensor:
            self.log.append(f"reduce {operation}")
            return values + self.others if operation == "sum" else values

        return reduce


@dataclass(kw_only=True)
class FakeLearner:
    """Holds one tensor, and gives every token the log-prob `logprob`."""

    parallel: FakeParallel = field(default_factory=FakeParallel)
    logprob: float = -0.5
    problem: str = ""  # of the weights
    log: list[str] = field(default_factory=list)

    def offload(self) -> None:
        self.log.append("offload")

    def onload(self) -> None:
        self.log.append("onload")

    def weights_problem(self) -> str:
        return self.problem

    def tensor_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [("model.norm.weight", (4,))]

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.log.append("full_tensors")
        yield "model.norm.weight", torch.arange(4.0)

    def tensor_stages(self) -> list[int]:
        return [0]

    def owned_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.log.append("owned_tensors")
        yield "model.norm.weight", torch.arange(4.0)

    def give_tensors(self) -> None:
        self.log.append("give_tensors")

    def score_samples(
        self,
        samples: Sequence[Sample],
        *,
        tokens_per_row: int,
        temperature: float | None = None,
    ) -> list[tuple[Sample, torch.Tensor]]:
        self.log.append(f"score_samples {len(samples)}")
        return [
            (sample, torch.full((len(sample.rollout.token_ids),), self.logprob))
            for sample in samples
        ]
