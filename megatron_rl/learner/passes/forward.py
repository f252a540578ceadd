"""[imports megatron] Runs packed rows through the model. Forward-only passes and the training step
share this code.

On the last pipeline stage it computes the log-probs of a `MicroBatch`'s kept labels. `run_schedule`
runs rows through Megatron's own forward-backward schedule, with or without a pipeline;
`evaluate_rows` is the forward-only pass built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rl.errors import DivergenceError
from megatron_rl.learner.layout.context import RowShare, row_share
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.attention import plan_stacks
from megatron_rl.learner.model.routing import RowRouting
from megatron_rl.learner.passes.row_routing import PassRouting
from megatron_rl.ops.broken_rows import check_broken_rows
from megatron_rl.ops.entropy import differentiable_entropy
from megatron_rl.ops.support_logprobs import support_logprobs
from megatron_rl.records import MicroBatch, RecomputedRow, Truncation

Item = TypeVar("Item")

WHOLE = Truncation()  # no token is excluded


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutput:
    """The model's output for one row: [T] tensors, 0 or False where the row's loss mask is False.

    Example of two tokens, the first one masked, with top_k=2: `RowOutput(logprobs=[0, -0.98],
    full_logprobs=[0, -1.2], entropy=[0, 1.03], is_outside_support=[False, False])`.
    """

    logprobs: torch.Tensor  # float32, of the truncated distribution; under gradient in training
    # float32, of the whole distribution, for the comparison with a reference policy; also under
    # gradient in training
    full_logprobs: torch.Tensor
    # float32, of the whole distribution at temperature T, in nats; under gradient if requested
    entropy: torch.Tensor
    # bool: the sampler could not have chosen this label with these logits; the token is kept anyway
    is_outside_support: torch.Tensor
    # [T, K] float32, of the tokens of the row's heads, from the distribution of `logprobs`; 0 where
    # there is no token; under gradient in training. None: the row has no heads
    head_logprobs: torch.Tensor | None = None

    def recomputed_row(self, micro_batch: MicroBatch) -> RecomputedRow:
        """The row with `recomputed_logprobs`; the weights must be those before the update. Both the
        separate pass and an update without a separate pass call this method.
        """
        head = self.head_logprobs
        return RecomputedRow(
            micro_batch=micro_batch,
            recomputed_logprobs=self.logprobs.detach(),
            is_outside_support=self.is_outside_support,
            recomputed_head_logprobs=None if head is None else head.detach(),
        )

    def full_row(self, micro_batch: MicroBatch) -> FullRow:
        """The row with its log-probs over the whole distribution."""
        return FullRow(micro_batch=micro_batch, full_logprobs=self.full_logprobs.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class FullRow:
    """A row with a model's log-probs over the whole distribution, even if the policy truncates it.

    Example of the row of `MicroBatch`'s example: `FullRow(micro_batch=MicroBatch(...),
    full_logprobs=[0, -0.4, -0.2, 0, 0, 0, 0, 0])`.
    """

    micro_batch: MicroBatch
    full_logprobs: torch.Tensor  # [T] float32, 0 where the row's loss mask is False


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The loss of one row.

    Example of a row of five tokens of which two are kept: `LossTerms(total=0.3, count=2,
    num_kept=2, result=RowResult(...))`.
    """

    # the sum [] under gradient and the count [] int32 that Megatron's loss contract requires
    total: torch.Tensor
    count: torch.Tensor
    num_kept: int  # tokens that count in the loss
    result: object  # `Learner.update` returns it to its caller


def share_of_row(row: MicroBatch, parallel: Parallel) -> RowShare:
    """The positions of the row that this rank computes."""
    dividing = parallel.tp_group if parallel.layout.sequence_parallel else None
    return row_share(_borders(row), row.cu_seqlens.numel() - 1, parallel.cp_group, dividing)


def _borders(row: MicroBatch) -> torch.Tensor:
    """Where each sequence starts in the row, and where the row ends, int32. The padding after the
    last sequence counts as one more sequence.
    """
    num_tokens, borders = row.tokens.numel(), row.cu_seqlens_padded
    if int(borders[-1]) < num_tokens:
        borders = torch.cat([borders, borders.new_tensor([num_tokens])])
    return borders


def packed_seq_params(row: MicroBatch, share: RowShare, routing: RowRouting) -> Any:
    """The boundaries of the row's sequences in the form that Megatron's attention layers expect,
    with this rank's positions that get logits and what routers of experts are told.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    borders = _borders(row)
    longest = int((borders[1:] - borders[:-1]).max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=borders,
        cu_seqlens_kv_padded=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    params.stack_plan = plan_stacks(row.cu_seqlens, row.cu_seqlens_padded, share)
    params.scored_positions = share.select(row.loss_mask).nonzero()[:, 0]
    params.routing = routing
    return params


def row_output(
    logits: torch.Tensor,
    row: MicroBatch,
    *,
    temperature: float,
    truncation: Truncation = WHOLE,
    vocab_size: int,
    parallel: Parallel,
    has_entropy_gradient: bool = False,
) -> RowOutput:
    """Log-probs of the kept labels from vocabulary-parallel logits. A collective over the ranks
    that share the row.

    Args:
        logits: of this rank's kept positions, [1, K, V / TP], any floating dtype; they are
            overwritten unless `has_entropy_gradient`.
        has_entropy_gradient: compute the entropy once more, with a gradient.
    Raises:
        DivergenceError: no log-prob can be computed from the logits; on the CPU, and on all ranks
            that share the row. On a GPU `check_broken_rows` raises it afterwards.
    """
    share = share_of_row(row, parallel)
    kept = share.select(row.loss_mask).nonzero()[:, 0]
    kept_logits = logits[0]
    place = {
        "temperature": temperature,
        "vocab_size": vocab_size,
        "group": parallel.tp_group if parallel.tp_size > 1 else None,
    }
    with _raised_together(share, logits.device):
        output = support_logprobs(
            kept_logits,
            share.select(row.labels)[kept],
            truncation=truncation,
            **place,
            # Only the separate pass for the entropy still needs the logits.
            overwrite_logits=not has_entropy_gradient,
            head=None if row.head_ids is None else share.select(row.head_ids)[kept].long(),
        )
    entropy = output.entropy
    if has_entropy_gradient:
        entropy = differentiable_entropy(kept_logits, **place)
    num_own = share.own.numel()

    def of_row(values: torch.Tensor) -> torch.Tensor:
        """[K, ...] of this rank's kept positions to [T, ...]."""
        own = values.new_zeros((num_own, *values.shape[1:]))
        return share.whole(own.index_copy(0, kept, values))

    head_logprobs = output.head_logprobs
    return RowOutput(
        logprobs=of_row(output.logprobs),
        full_logprobs=of_row(output.full_logprobs),
        entropy=of_row(entropy),
        is_outside_support=of_row(output.is_outside.float()).bool(),
        head_logprobs=None if head_logprobs is None else of_row(head_logprobs),
    )


@contextmanager
def _raised_together(share: RowShare, device: torch.device) -> Iterator[None]:
    """A DivergenceError in the context, of one of the ranks that share a row, is raised on all of
    them, because each of them needs the others' log-probs. On a GPU there is none (broken_rows.py).
    A collective over these ranks on CPUs.
    """
    if share.group is None or device.type != "cpu":
        yield
        return
    own: DivergenceError | None = None
    try:
        yield
    except DivergenceError as error:
        own = error
    is_broken = torch.tensor([own is not None], dtype=torch.int32)
    dist.all_reduce(is_broken, op=dist.ReduceOp.MAX, group=share.group)
    if own is not None:
        raise own
    if is_broken:
        raise DivergenceError("logits of a context-parallel rank are broken")


@torch.no_grad()
def evaluate_rows(
    parts: Sequence[torch.nn.Module],
    rows: Sequence[MicroBatch],
    take: Callable[[RowOutput, MicroBatch], Item],
    *,
    temperature: float,
    truncation: Truncation,
    vocab_size: int,
    parallel: Parallel,
    name: str,
    routing: PassRouting | None = None,
) -> list[Item]:
    """A forward-only pass. A collective over the ranks of a replica.

    Args:
        parts: this rank's parts of the model, in layer order.
        take: selects the result from a row's output, such as `RowOutput.recomputed_row`.
        name: of the pass, for messages.
        routing: what routers of experts are told; None: that they choose.
    Returns:
        On the last pipeline stage one item for each row; empty on other stages.
    Raises:
        DivergenceError: no log-prob can be computed from the logits; after the pass, in which the
            other ranks need this one. DataError: a label is outside the vocabulary.
    """
    if not rows:
        return []
    problems: list[DivergenceError] = []

    def on_output(index: int, logits: torch.Tensor) -> Item | None:
        try:
            output = row_output(
                logits,
                rows[index],
                temperature=temperature,
                truncation=truncation,
                vocab_size=vocab_size,
                parallel=parallel,
            )
        except DivergenceError as error:
            problems.append(error)
            return None
        return take(output, rows[index])

    settings = {"parallel": parallel, "forward_only": True, "routing": routing}
    items = run_schedule(parts, rows, on_output, **settings)
    if problems:
        raise DivergenceError(f"{name}: {problems[0]}")
    # Checked once for the whole pass, because the check synchronises with the device.
    check_broken_rows(parallel.device, name)
    return items


def run_schedule(
    parts: Sequence[torch.nn.Module],
    rows: Sequence[MicroBatch],
    on_output: Callable[[int, torch.Tensor], Any],
    *,
    parallel: Parallel,
    forward_only: bool,
    routing: PassRouting | None = None,
) -> list[Any]:
    """Run the rows through Megatron's pipeline schedule.

    Args:
        parts: this rank's parts of the model, in layer order.
        rows: this rank's micro-batches, the same number on every DP rank; all of one length if the
            model has several pipeline stages, and in a virtual pipeline a multiple of their number.
        on_output: `(index of the row, logits [1, K, V / TP])`, called on the last stage, with the
            logits of the K positions of this rank that the loss mask keeps. In training it returns
            Megatron's `(sum, count, anything)`; with `forward_only` it returns anything.
        routing: as in `evaluate_rows`.
    Returns:
        On the last stage the value that `on_output` returned for each row (in training the third
        item of it); empty on other stages.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    routing = routing or PassRouting()

    def forward_step(
        numbered_rows: Any, stage: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        index, row = next(numbered_rows)
        share = share_of_row(row, parallel)
        tokens, positions = share.select(row.tokens), share.select(row.positions)
        params = packed_seq_params(row, share, routing.of_row(index, row, share))
        output = stage(tokens[None], positions[None], None, packed_seq_params=params)
        return output, partial(_call_with_output, on_output, index)

    # The schedule of a virtual pipeline reads the rows once for each part.
    iterators = [iter(list(enumerate(rows))) for _ in parts]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(parts) > 1 else iterators[0],
        model=list(parts),
        num_microbatches=len(rows),
        seq_length=rows[0].tokens.numel(),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _call_with_output(
    on_output: Callable[[int, torch.Tensor], Any],
    index: int,
    output: torch.Tensor,
    non_loss_data: bool = False,  # Megatron's name; tells a forward-only pass from a training pass
) -> Any:
    return on_output(index, output)
