"""[door: tensorboard] The curves of a run, one event file writer, on rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

# Custom Scalars page: category -> chart -> tags (regular expressions) drawn into it.
LAYOUT = {
    "reward": {
        "reward": ["Multiline", ["^reward/mean$", "^eval/reward/mean$"]],
        "evaluation": ["Multiline", ["^eval/(avg|pass)_at_[0-9]+$"]],
        "rates": ["Multiline", ["^reward/[^/]+_rate/mean$", "^rollout/truncation_rate/mean$"]],
        "response tokens": ["Multiline", ["^rollout/response_tokens/.*"]],
    },
    "discrepancy and constraint": {
        "mean and tolerance": ["Multiline", ["^discrepancy/mean$", "^constraint/tolerance$"]],
        "quantiles and max": ["Multiline", ["^discrepancy/q[0-9.]+$", "^discrepancy/max$"]],
        "lambda": ["Multiline", ["^constraint/lambda$"]],
        "by age": ["Multiline", ["^discrepancy/age_.*"]],
    },
    "learner": {
        "loss": ["Multiline", ["^loss/mean$"]],
        "gradient norm": ["Multiline", ["^learner/grad_norm$"]],
        "clip fraction": ["Multiline", ["^loss/clip_fraction.*"]],
        "entropy": ["Multiline", ["^loss/entropy/mean$"]],
        "learning rate": ["Multiline", ["^learner/learning_rate$"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["^speed/tokens_per_second$"]],
        "seconds by station": ["Multiline", ["^speed/seconds/.*"]],
    },
}


class TensorBoardWriter:
    """Writes scalars below a run's `tensorboard/` folder; one process has one.

    Args:
        folder: made if it is not there.
        purge_step: on resume, the first step that is done again: TensorBoard then hides what the
            earlier process wrote of it and of later ones. None in a run from the start.
    """

    def __init__(self, folder: str | Path, *, purge_step: int | None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._writer.add_custom_scalars(LAYOUT)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one step and flushes it, so that a run that is killed has shown all it did."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
