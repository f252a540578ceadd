"""[imports megatron] One rank of the learner: its parts of the model, their optimizer, and the
passes over a batch.

The loops in train.py and sft.py use `Learner`, which calls the other modules of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_rl.config.learner import MoeConfig, OptimizerConfig
from megatron_rl.config.model import ModelConfig
from megatron_rl.errors import BrokenUpdateError, DivergenceError
from megatron_rl.learner.batch.deal import pack_rows, split_by_sample
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import build_model
from megatron_rl.learner.model.export import (
    full_tensors,
    owned_tensors,
    tensor_shapes,
    tensor_stages,
)
from megatron_rl.learner.model.implementations import describe_implementations
from megatron_rl.learner.model.offload import OptimizerOffload
from megatron_rl.learner.model.optimizer import build_optimizer
from megatron_rl.learner.model.routing import BalanceScales
from megatron_rl.learner.model.training_model import TrainingModel
from megatron_rl.learner.passes.forward import (
    WHOLE,
    FullRow,
    LossTerms,
    RowOutput,
    evaluate_rows,
    row_output,
    run_schedule,
)
from megatron_rl.learner.passes.router_memory import RouterMemory
from megatron_rl.ops import kernels
from megatron_rl.ops.broken_rows import check_broken_rows
from megatron_rl.records import MicroBatch, RecomputedRow, Sample, Truncation
from megatron_rl.weights.geometry import Geometry

# Takes a row's index and the model's output for it.
RowLoss = Callable[[int, RowOutput], LossTerms]
# Far above a gradient that means something; the sum of the squares of 10^11 such numbers is still a
# float32.
LARGEST_GRADIENT = 1e13


class Learner:
    """The part of the model of `geometry` that this rank of `parallel` holds, loaded from
    `model.path`.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        geometry: Geometry,
        parallel: Parallel,
        *,
        num_updates: int,
        temperature: float = 1.0,
        reference: Callable[[Sequence[MicroBatch]], list[FullRow]] | None = None,
        truncation: Truncation = WHOLE,
        moe: MoeConfig | None = None,
    ) -> None:
        """
        Args:
            num_updates: optimizer steps of the whole run, for a decaying learning rate.
            temperature: the policy's; the learner computes every log-prob at this temperature.
            reference: the full log-probs of a frozen policy (`FrozenPolicy.full_logprobs`); None:
                there is none.
            truncation: the policy's; recomputed and policy log-probs are computed over its support.
            moe: settings of the routers of a mixture of experts; None: the defaults.
        Raises:
            ConfigError: the model does not allow the layout or an option.
            DataError: the checkpoint does not match the geometry.
        """
        self.geometry = geometry
        self.parallel = parallel
        self.temperature = temperature
        self.truncation = truncation
        self.moe = moe or MoeConfig()
        replays = self.moe.routing_replay != "none"
        parts = build_model(model, geometry, parallel, optimizer, has_routing_replay=replays)
        built, scheduler = build_optimizer(optimizer, parts, num_updates=num_updates)
        self.trained = TrainingModel(
            parallel=parallel, geometry=geometry, parts=parts, optimizer=built, scheduler=scheduler
        )
        self._routers = RouterMemory(geometry, parallel, self.moe)
        self.implementations = describe_implementations(model, optimizer)
        self._offloaded = OptimizerOffload(self.trained)
        self._reference = reference

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last optimizer step."""
        return self.trained.optimizer.param_groups[0]["lr"]

    @property
    def logprob_backend(self) -> str:
        """A description of the implementation that computes log-probs here: `C++ (avx512)`."""
        return kernels.backend(self.parallel.device)

    def offload(self) -> int:
        """Move gradients and the optimizer's state to host memory, where they do not take memory
        from engines on the same GPU, and return the number of bytes freed. Until `onload`, no
        checkpoint can be saved and no update taken back.
        """
        return self._offloaded.offload()

    def onload(self) -> None:
        """Bring back what `offload` has moved, if it has. `update` does so by itself."""
        self._offloaded.onload()

    def recompute(
        self, rows: Sequence[MicroBatch], *, is_for_update: bool = False
    ) -> list[RecomputedRow]:
        """`recomputed_logprobs` at the current weights: a record for each row on the last pipeline
        stage, an empty list on the others. A collective over the ranks of a replica; of a mixture
        of experts, over all ranks.

        Args:
            is_for_update: whether the same rows are given to `update` afterwards, which may have to
                send their tokens to the same experts.
        Raises:
            DivergenceError: no log-prob can be computed from the logits. DataError: a label is
                outside the vocabulary.
        """
        return evaluate_rows(
            self.trained.parts,
            rows,
            RowOutput.recomputed_row,
            routing=self._routers.of_recomputation(rows, is_for_update=is_for_update),
            temperature=self.temperature,
            truncation=self.truncation,
            vocab_size=self.geometry.vocab_size,
            parallel=self.parallel,
            name="recomputation",
        )

    def full_logprobs(
        self, rows: Sequence[MicroBatch], *, temperature: float | None = None
    ) -> list[FullRow]:
        """Like `recompute`, but with log-probs over the whole distribution, even if the policy
        truncates it.

        Args:
            temperature: None: the policy's.
        """
        return evaluate_rows(
            self.trained.parts,
            rows,
            RowOutput.full_row,
            temperature=self.temperature if temperature is None else temperature,
            truncation=WHOLE,
            vocab_size=self.geometry.vocab_size,
            parallel=self.parallel,
            name="full log-probs",
        )

    def reference_logprobs(self, rows: Sequence[MicroBatch]) -> list[FullRow]:
        """The full log-probs of the frozen reference policy; empty if there is no reference."""
        return [] if self._reference is None else self._reference(rows)

    def score_samples(
        self,
        samples: Sequence[Sample],
        *,
        tokens_per_row: int,
        temperature: float | None = None,
    ) -> list[tuple[Sample, torch.Tensor]]:
        """Full log-probs of samples that global rank 0 holds. A collective over all ranks; every
        replica computes the log-probs of all samples.

        Args:
            samples: read on rank 0, ignored on the other ranks.
            temperature: None: the policy's.
        Returns:
            On the last pipeline stage of every replica, each sample with its log-probs, [L] float32
            on the CPU, aligned with its tokens, 0.0 where its loss mask is False. Empty on the
            other stages.
        """
        samples = self.parallel.from_first_rank(samples)
        rows = pack_rows(samples, self.parallel, tokens_per_row, min_rows=1)
        return [
            pair
            for row in self.full_logprobs(rows, temperature=temperature)
            for pair in split_by_sample(row.micro_batch, row.full_logprobs)
        ]

    def update(
        self,
        rows: Sequence[MicroBatch],
        row_loss: RowLoss,
        *,
        has_entropy_gradient: bool = False,
        balance: BalanceScales | None = None,
    ) -> tuple[list[object], float | None]:
        """Forward, backward and one optimizer step over all ranks' rows. If no rank has a kept
        token, there is no optimizer step: weights, moments and schedule do not change.

        Args:
            rows: this rank's micro-batches; the same number on every DP rank.
            row_loss: called on the last stage for each row.
            has_entropy_gradient: whether the output's entropy is under gradient, which costs
                another pass over the logits.
            balance: the factors of the losses that balance experts; None: there are none.
        Returns:
            The result of each row (on the last stage; empty on the others), and the gradient's norm
            before clipping; None, on every rank, if there was no optimizer step.
        Raises:
            BrokenUpdateError: on every rank, if on any rank `row_loss` raises DivergenceError, no
                log-prob can be computed from the logits, or a gradient is not finite.
            DataError: a label is outside the vocabulary.
        """
        num_kept = 0
        problem = ""

        def on_output(
            index: int, logits: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, object]:
            nonlocal num_kept, problem
            terms = self._terms(rows[index], index, logits, row_loss, has_entropy_gradient)
            if isinstance(terms, str):
                # This rank goes on with the others, so that all decide alike afterwards.
                problem = problem or terms
                nothing = torch.zeros((), dtype=torch.int32, device=logits.device)
                return 0.0 * logits.sum(), nothing, None
            num_kept += terms.num_kept
            # The ranks that share a row have the same loss; Megatron adds their counts.
            count = terms.count if self.parallel.is_row_head else torch.zeros_like(terms.count)
            return terms.total, count, terms.result

        trained = self.trained
        self.onload()
        for part in trained.parts:
            part.zero_grad_buffer()
        trained.optimizer.zero_grad()
        routing = self._routers.of_update(rows, balance)
        settings = {"parallel": self.parallel, "forward_only": False, "routing": routing}
        results = run_schedule(trained.parts, rows, on_output, **settings)
        if problem := self.parallel.first_problem(problem or self._gradient_problem()):
            raise BrokenUpdateError(problem)
        # With a gradient of 0, momentum and weight decay would still move the weights. Only the
        # last stage knows what is kept, and all ranks must decide alike.
        if not self.parallel.any_rank(num_kept > 0):
            return results, None
        # Done before the optimizer's step, so that the first step of a warm-up has a rate above 0.
        trained.scheduler.step(1)
        _, grad_norm, _ = trained.optimizer.step()
        grad_norm = float(grad_norm)
        if grad_norm != grad_norm or grad_norm == float("inf"):
            raise DivergenceError(
                f"optimizer step: expected a finite gradient norm, got {grad_norm}; lower "
                "learner.optimizer.learning_rate, or continue from the last checkpoint"
            )
        return results, grad_norm

    def _terms(
        self,
        row: MicroBatch,
        index: int,
        logits: torch.Tensor,
        row_loss: RowLoss,
        has_entropy_gradient: bool,
    ) -> LossTerms | str:
        """The loss of a row, or what is not finite in it."""
        try:
            output = row_output(
                logits,
                row,
                temperature=self.temperature,
                truncation=self.truncation,
                vocab_size=self.geometry.vocab_size,
                parallel=self.parallel,
                has_entropy_gradient=has_entropy_gradient,
            )
            # The row's loss has synchronised with the device already, so this adds no wait.
            check_broken_rows(logits.device, f"micro-batch {index}")
            return row_loss(index, output)
        except DivergenceError as error:
            return str(error)

    def weights_problem(self) -> str:
        """Which weight of which rank is not finite; "" if all are. The same on every rank; a
        collective over all ranks.
        """
        self.trained.finish_weights()
        named = [
            (name, torch.linalg.vector_norm(weight.detach(), torch.inf))
            for part in self.trained.modules
            for name, weight in part.named_parameters()
            if weight.numel()
        ]
        problem = ""
        if named and not bool(torch.stack([size for _, size in named]).isfinite().all()):
            name, size = next(each for each in named if not each[1].isfinite())
            problem = f"rank {self.parallel.rank}: expected finite weights, got {size} in {name}"
        return self.parallel.first_problem(problem)

    def _gradient_problem(self) -> str:
        """What is wrong with this rank's gradient; "" if it is finite."""
        largest = [
            torch.linalg.vector_norm(buffer.grad_data, torch.inf)
            for part in self.trained.parts
            for buffer in (*part.buffers, *part.expert_parallel_buffers)
            if buffer.grad_data.numel()
        ]
        # Written so that NaN, for which every comparison is false, is a problem.
        if not largest or bool((torch.stack(largest) <= LARGEST_GRADIENT).all()):
            return ""
        return (
            f"rank {self.parallel.rank}: expected a finite gradient, got one whose largest number "
            f"is {float(torch.stack(largest).max()):g}; lower learner.optimizer.learning_rate"
        )

    def take_router_metrics(self) -> dict[str, float]:
        """The metrics of a mixture's routers in the updates since the last call, the same on every
        rank; empty for a dense model. A collective over all ranks.
        """
        return self._routers.take_metrics()

    def tensor_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every Hugging Face tensor, in the order of `full_tensors`."""
        return tensor_shapes(self.geometry)

    def tensor_stages(self) -> list[int]:
        """The pipeline stage of each tensor of `tensor_shapes`."""
        return tensor_stages(self.geometry, self.parallel.layout)

    def owned_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors of this stage, on its source of weights (see export.py); the
        other ranks must iterate too.
        """
        self.trained.finish_weights()
        return owned_tensors(self.trained.modules, self.geometry, self.parallel)

    def give_tensors(self) -> None:
        """Contribute this rank's shards to rank 0's `full_tensors`; every other rank must call this
        method.
        """
        for _ in self.full_tensors():
            pass

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as Hugging Face tensors, on global rank 0. A collective (see export.py)."""
        self.trained.finish_weights()
        return full_tensors(self.trained.modules, self.geometry, self.parallel)
