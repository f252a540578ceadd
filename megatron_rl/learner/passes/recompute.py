"""A forward-only pass through Megatron's schedule: rows in, `recomputed_logprobs` out, at the
weights as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.passes.forward import WHOLE, row_output, run_schedule
from megatron_rl.ops.broken_rows import check_broken_rows
from megatron_rl.records import MicroBatch, Truncation


@torch.no_grad()
def recompute_logprobs(
    model: torch.nn.Module,
    rows: Sequence[MicroBatch],
    *,
    temperature: float,
    truncation: Truncation = WHOLE,
    vocab_size: int,
    parallel: Parallel,
) -> list[torch.Tensor]:
    """The learner's log-probs of every kept label.

    Returns:
        On the last pipeline stage a [T] float32 a row, 0 where its loss mask is False; empty on
        other stages.
    Raises:
        DivergenceError: logits that no log-prob comes from. DataError: a label outside the
            vocabulary.
    """
    if not rows:
        return []

    def on_output(index: int, logits: torch.Tensor) -> torch.Tensor:
        output = row_output(
            logits,
            rows[index],
            temperature=temperature,
            truncation=truncation,
            vocab_size=vocab_size,
            parallel=parallel,
        )
        return output.logprobs

    logprobs = run_schedule(model, rows, on_output, forward_only=True)
    # Once a pass, at its end: its log-probs are looked at next.
    check_broken_rows(parallel.device, "recomputation")
    return logprobs
