"""[imports megatron] One rank of the learner: a model stage, its optimizer, and the passes over a
batch.

`Learner` is what the loops in train.py and sft.py hold; the work is done by the modules beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_rl.config import ModelConfig, OptimizerConfig
from megatron_rl.errors import DivergenceError
from megatron_rl.learner.batch.deal import pack_rows, split_by_sample
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.export import full_tensors, tensor_shapes
from megatron_rl.learner.model.training_model import build_training_model
from megatron_rl.learner.passes.forward import (
    WHOLE,
    FullRow,
    RowOutput,
    evaluate_rows,
    row_output,
    run_schedule,
)
from megatron_rl.learner.passes.frozen import FrozenPolicy
from megatron_rl.ops import kernels
from megatron_rl.ops.broken_rows import check_broken_rows
from megatron_rl.records import MicroBatch, RecomputedRow, Sample, Truncation
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
            truncation: of the policy: recomputed and policy log-probs are taken over its support.
        """
        self.geometry = geometry
        self.parallel = parallel
        self.temperature = temperature
        self.truncation = truncation
        self.trained = build_training_model(
            model, optimizer, geometry, parallel, num_updates=num_updates
        )
        self._reference = None
        if reference_path:
            self._reference = FrozenPolicy(reference_path, model, parallel, temperature=temperature)

    @property
    def learning_rate(self) -> float:
        """Of the last optimizer step."""
        return self.trained.optimizer.param_groups[0]["lr"]

    @property
    def logprob_backend(self) -> str:
        """The implementation that computes log-probs here, in words: `C++ (avx512)`."""
        return kernels.backend(self.parallel.device)

    def recompute(self, rows: Sequence[MicroBatch]) -> list[RecomputedRow]:
        """`recomputed_logprobs` at the present weights: on the last pipeline stage a record for
        each row, elsewhere nothing. A collective over the ranks of a replica.

        Raises:
            DivergenceError: logits from which no log-prob can be computed. DataError: a label
                outside the vocabulary.
        """
        return evaluate_rows(
            self.trained.model,
            rows,
            RowOutput.recomputed_row,
            temperature=self.temperature,
            truncation=self.truncation,
            vocab_size=self.geometry.vocab_size,
            parallel=self.parallel,
            name="recomputation",
        )

    def full_logprobs(self, rows: Sequence[MicroBatch]) -> list[FullRow]:
        """Log-probs over the whole distribution, whatever the policy's truncation; otherwise as
        `recompute`.
        """
        return evaluate_rows(
            self.trained.model,
            rows,
            RowOutput.full_row,
            temperature=self.temperature,
            truncation=WHOLE,
            vocab_size=self.geometry.vocab_size,
            parallel=self.parallel,
            name="full log-probs",
        )

    def reference_logprobs(self, rows: Sequence[MicroBatch]) -> list[FullRow]:
        """The full log-probs of the frozen reference policy; nothing where there is none."""
        return [] if self._reference is None else self._reference.full_logprobs(rows)

    def score_samples(
        self, samples: Sequence[Sample], *, tokens_per_row: int
    ) -> list[tuple[Sample, torch.Tensor]]:
        """Full log-probs of samples that global rank 0 holds; a collective over all ranks, in which
        every replica computes all of them.

        Args:
            samples: on rank 0; ignored elsewhere.
        Returns:
            On the last pipeline stage of every replica each sample with its log-probs [L] float32
            on the CPU, aligned with its tokens, 0.0 where its loss mask is False; elsewhere
            nothing.
        """
        samples = self.parallel.from_first_rank(samples)
        rows = pack_rows(samples, self.parallel, tokens_per_row, min_rows=1)
        return [
            pair
            for row in self.full_logprobs(rows)
            for pair in split_by_sample(row.micro_batch, row.full_logprobs)
        ]

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
            DivergenceError: the gradient's norm is not finite (on every rank), or logits from which
                no log-prob can be computed. DataError: a label outside the vocabulary.
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
            # The row's loss synchronises with the device anyway, so this costs no further wait.
            check_broken_rows(logits.device, f"micro-batch {index}")
            return row_loss(index, output)

        trained = self.trained
        trained.model.zero_grad_buffer()
        trained.optimizer.zero_grad()
        results = run_schedule(trained.model, rows, on_output, forward_only=False)
        # Before the optimizer's step, so that the first step of a warm-up has a rate above 0.
        trained.scheduler.step(1)
        _, grad_norm, _ = trained.optimizer.step()
        grad_norm = float(grad_norm)
        if grad_norm != grad_norm or grad_norm == float("inf"):
            raise DivergenceError(
                f"optimizer step: expected a finite gradient norm, got {grad_norm}; lower "
                "learner.optimizer.learning_rate, or continue from the last checkpoint"
            )
        return results, grad_norm

    def tensor_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every Hugging Face tensor, in the order of `full_tensors`."""
        return tensor_shapes(self.geometry)

    def give_tensors(self) -> None:
        """Take part in rank 0's `full_tensors`; to be called on every other rank."""
        for _ in self.full_tensors():
            pass

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as Hugging Face tensors, on global rank 0; a collective (export.py)."""
        return full_tensors(self.trained.model.module, self.geometry, self.parallel)
