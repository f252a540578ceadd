"""[door: megatron] One rank of the learner: a model stage, its optimizer, and the passes over a
batch.

`Learner` is what the loops in train.py and sft.py hold; what it does stands in the files beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_rl.config import ModelConfig, OptimizerConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import build_model
from megatron_rl.learner.model.export import full_tensors, tensor_shapes
from megatron_rl.learner.model.optimizer import build_optimizer
from megatron_rl.learner.passes.forward import WHOLE, RowOutput, row_output, run_schedule
from megatron_rl.learner.passes.frozen import Reference
from megatron_rl.learner.passes.recompute import recompute_logprobs
from megatron_rl.ops import kernels
from megatron_rl.ops.broken_rows import check_broken_rows
from megatron_rl.records import MicroBatch, Truncation
from megatron_rl.weights.geometry import Geometry

# Given a row's number and its output: Megatron's contract (sum, count), and anything to hand back.
RowLoss = Callable[[int, RowOutput], tuple[torch.Tensor, torch.Tensor, object]]


class Learner:
    """A model of `geometry`, loaded from `model.path`, on this rank of `parallel`."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        geometry: Geometry,
        parallel: Parallel,
        *,
        num_updates: int,
        temperature: float = 1.0,
        reference_path: str = "",
        truncation: Truncation = WHOLE,
    ) -> None:
        """
        Args:
            num_updates: optimizer steps of the whole run, for a decaying learning rate.
            temperature: of the policy, at which every log-prob of the learner is taken.
            reference_path: checkpoint of a frozen reference policy; "": none.
            truncation: of the policy, over whose support they are taken.
        """
        self.geometry = geometry
        self.parallel = parallel
        self.temperature = temperature
        self.truncation = truncation
        self.model = build_model(
            model, geometry, parallel, use_distributed_optimizer=optimizer.distributed
        )
        self.optimizer, self.scheduler = build_optimizer(
            optimizer, self.model, num_updates=num_updates
        )
        self._reference = None
        if reference_path:
            self._reference = Reference(reference_path, model, parallel, temperature=temperature)

    @property
    def learning_rate(self) -> float:
        """Of the last optimizer step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def logprob_backend(self) -> str:
        """What computes log-probs here, in words: `C++ (avx512)`."""
        return kernels.backend(self.parallel.device)

    def recompute(
        self, rows: Sequence[MicroBatch], *, truncation: Truncation | None = None
    ) -> list[torch.Tensor]:
        """`recomputed_logprobs` at the present weights: on the last stage a [T] float32 a row,
        elsewhere nothing. With `truncation` they are of another policy than the learner's own.
        """
        return recompute_logprobs(
            self.model,
            rows,
            temperature=self.temperature,
            truncation=self.truncation if truncation is None else truncation,
            vocab_size=self.geometry.vocab_size,
            parallel=self.parallel,
        )

    def reference_logprobs(self, rows: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """The frozen reference policy's, as `recompute`; nothing where there is none."""
        return [] if self._reference is None else self._reference.logprobs(rows)

    def update(
        self, rows: Sequence[MicroBatch], row_loss: RowLoss, *, has_entropy_gradient: bool = False
    ) -> tuple[list[object], float]:
        """Forward, backward and one optimizer step over all ranks' rows.

        Args:
            rows: this rank's micro-batches; the same number on every DP rank.
            row_loss: called on the last stage for each row.
            has_entropy_gradient: the output's entropy is under gradient, which costs another pass
                over the logits.
        Returns:
            What `row_loss` handed back for each row (on the last stage; empty elsewhere), and the
            gradient's norm before clipping.
        Raises:
            DivergenceError: the gradient's norm is not finite (on every rank), or logits that no
                log-prob comes from. DataError: a label outside the vocabulary.
        """

        def on_output(
            index: int, logits: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, object]:
            output = row_output(
                logits,
                rows[index],
                temperature=self.temperature,
                truncation=self.truncation,
                vocab_size=self.geometry.vocab_size,
                parallel=self.parallel,
                has_entropy_gradient=has_entropy_gradient,
            )
            # The row's loss waits for its numbers, and so nothing more waits here.
            check_broken_rows(logits.device, f"micro-batch {index}")
            return row_loss(index, output)

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = run_schedule(self.model, rows, on_output, forward_only=False)
        # Before the step, so that a warm-up's first step does not have a rate of 0.
        self.scheduler.step(1)
        _, grad_norm, _ = self.optimizer.step()
        grad_norm = float(grad_norm)
        if grad_norm != grad_norm or grad_norm == float("inf"):
            raise DivergenceError(
                f"optimizer step: expected a finite gradient norm, got {grad_norm}; lower "
                "learner.optimizer.learning_rate, or go on from the last checkpoint"
            )
        return results, grad_norm

    def tensor_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every Hugging Face tensor, in the order of `full_tensors`."""
        return tensor_shapes(self.geometry)

    def give_tensors(self) -> None:
        """Take part in rank 0's `full_tensors`; for every other rank."""
        for _ in self.full_tensors():
            pass

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as Hugging Face tensors, on global rank 0; a collective (export.py)."""
        return full_tensors(self.model.module, self.geometry, self.parallel)
