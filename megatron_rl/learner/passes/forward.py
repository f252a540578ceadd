"""[imports megatron] Runs packed rows through the model. Forward-only passes and the training step
share this code.

On the last pipeline stage it computes the log-probs of a `MicroBatch`'s kept labels. `run_schedule`
runs rows through Megatron's own forward-backward schedule, with or without a pipeline;
`evaluate_rows` is the forward-only pass built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.attention import plan_stacks
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


def packed_seq_params(row: MicroBatch) -> Any:
    """The boundaries of the row's sequences in the form that Megatron's attention layers expect.
    The padding after the last sequence counts as one more sequence.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    num_tokens = row.tokens.numel()
    borders = row.cu_seqlens_padded
    if int(borders[-1]) < num_tokens:
        borders = torch.cat([borders, borders.new_tensor([num_tokens])])
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
    params.stack_plan = plan_stacks(row.cu_seqlens, row.cu_seqlens_padded, num_tokens)
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
    """Log-probs of the kept labels from vocabulary-parallel logits.

    Args:
        logits: this rank's, [1, T, V / TP], any floating dtype.
        has_entropy_gradient: compute the entropy once more, with a gradient.
    """
    kept = row.loss_mask.nonzero()[:, 0]
    kept_logits = logits[0].index_select(0, kept)
    place = {
        "temperature": temperature,
        "vocab_size": vocab_size,
        "group": parallel.tp_group if parallel.tp_size > 1 else None,
    }
    output = support_logprobs(
        kept_logits,
        row.labels[kept],
        truncation=truncation,
        **place,
        # `kept_logits` is a copy that only the separate pass for the entropy still needs.
        overwrite_logits=not has_entropy_gradient,
        head=None if row.head_ids is None else row.head_ids[kept].long(),
    )
    entropy = output.entropy
    if has_entropy_gradient:
        entropy = differentiable_entropy(kept_logits, **place)
    zeros = torch.zeros(row.tokens.numel(), dtype=torch.float32, device=logits.device)
    head_logprobs = output.head_logprobs
    if head_logprobs is not None:
        no_heads = zeros.new_zeros(row.head_ids.shape)
        head_logprobs = no_heads.index_copy(0, kept, head_logprobs)
    return RowOutput(
        logprobs=zeros.index_copy(0, kept, output.logprobs),
        full_logprobs=zeros.index_copy(0, kept, output.full_logprobs),
        entropy=zeros.index_copy(0, kept, entropy),
        is_outside_support=zeros.bool().index_copy(0, kept, output.is_outside),
        head_logprobs=head_logprobs,
    )


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
) -> list[Item]:
    """A forward-only pass. A collective over the ranks of a replica.

    Args:
        parts: this rank's parts of the model, in layer order.
        take: selects the result from a row's output, such as `RowOutput.recomputed_row`.
        name: of the pass, for messages.
    Returns:
        On the last pipeline stage one item for each row; empty on other stages.
    Raises:
        DivergenceError: no log-prob can be computed from the logits. DataError: a label is outside
            the vocabulary.
    """
    if not rows:
        return []

    def on_output(index: int, logits: torch.Tensor) -> Item:
        output = row_output(
            logits,
            rows[index],
            temperature=temperature,
            truncation=truncation,
            vocab_size=vocab_size,
            parallel=parallel,
        )
        return take(output, rows[index])

    items = run_schedule(parts, rows, on_output, forward_only=True)
    # Checked once for the whole pass, because the check synchronises with the device.
    check_broken_rows(parallel.device, name)
    return items


def run_schedule(
    parts: Sequence[torch.nn.Module],
    rows: Sequence[MicroBatch],
    on_output: Callable[[int, torch.Tensor], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run the rows through Megatron's pipeline schedule.

    Args:
        parts: this rank's parts of the model, in layer order.
        rows: this rank's micro-batches, the same number on every DP rank; all of one length if the
            model has several pipeline stages, and in a virtual pipeline a multiple of their number.
        on_output: `(index of the row, logits [1, T, V / TP])`, called on the last stage. In
            training it returns Megatron's `(sum, count, anything)`; with `forward_only` it returns
            anything.
    Returns:
        On the last stage the value that `on_output` returned for each row (in training the third
        item of it); empty on other stages.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(
        numbered_rows: Any, stage: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        index, row = next(numbered_rows)
        output = stage(
            row.tokens[None], row.positions[None], None, packed_seq_params=packed_seq_params(row)
        )
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
