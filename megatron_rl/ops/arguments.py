"""Checks the arguments that the log-prob functions share; prepares labels and the shard."""

from __future__ import annotations

import math

import torch
from torch.distributed import ProcessGroup

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.ops.vocab_parallel import VocabShard, vocab_shard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_ignored(
    labels: torch.Tensor, ignore_index: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replace ignored labels by a token id of the vocabulary.

    Returns:
        labels [N] int64 with 0 in ignored rows, and `is_counted` [N] bool, False in ignored rows;
        None where `ignore_index` is None and every row counts.
    """
    if ignore_index is None:
        return labels, None
    is_counted = labels != ignore_index
    return torch.where(is_counted, labels, 0), is_counted


def shard_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    vocab_size: int | None,
    group: ProcessGroup | None,
) -> VocabShard:
    """This rank's shard of the vocabulary, after checking the arguments of `token_logprobs`.

    Raises:
        As `token_logprobs`.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"token_logprobs: expected logits of shape [N, V], got {tuple(logits.shape)}"
        )
    shard = vocab_shard(logits.shape[1], vocab_size, group)
    check_rows(logits.dtype, logits.shape[0], labels, temperature, shard)
    return shard


def check_rows(
    dtype: torch.dtype, num_rows: int, labels: torch.Tensor, temperature: float, shard: VocabShard
) -> None:
    """Check dtype, labels and temperature; labels on a GPU are checked by the kernel instead.

    Raises:
        ValueError: the dtype or the shape of the labels is wrong. ConfigError: the temperature is
            not above 0. DataError: a label is outside the vocabulary (on the CPU).
    """
    if dtype not in DTYPES:
        raise ValueError(f"token_logprobs: expected float32, bfloat16 or float16, got {dtype}")
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"token_logprobs: expected labels [{num_rows}] int64, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            f"temperature: expected a finite number above 0, got {temperature}; "
            "change rollout.sampling.temperature"
        )
    if labels.device.type != "cpu":
        return
    is_outside = (labels < 0) | (labels >= shard.vocab_size)
    if bool(is_outside.any()):
        row = int(is_outside.int().argmax())
        raise DataError(
            f"label of row {row}: expected a token id of 0 to {shard.vocab_size - 1}, "
            f"got {int(labels[row])}; do tokenizer and model have the same vocabulary?"
        )
