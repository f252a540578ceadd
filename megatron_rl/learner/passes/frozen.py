"""[imports megatron] A frozen policy in addition to the learner, the reference of a KL term. It
holds a checkpoint's weights in the learner's layout.

It has no gradients and no optimizer, and is not part of the run's checkpoints. It needs memory for
one copy of the weights in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.config.model import ModelConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import DTYPES, build_parts, transformer_config
from megatron_rl.learner.passes.forward import WHOLE, FullRow, RowOutput, evaluate_rows
from megatron_rl.records import MicroBatch
from megatron_rl.weights.geometry import read_geometry


class FrozenPolicy:
    """This rank's part of the model in `path`, which is never trained."""

    def __init__(
        self, path: str | Path, model: ModelConfig, parallel: Parallel, *, temperature: float
    ) -> None:
        """
        Args:
            path: Hugging Face checkpoint folder.
            model: settings of the dtype and the kernels.
            temperature: the learner's; the log-probs are computed at this temperature.
        """
        dtype = DTYPES[model.dtype]
        geometry = read_geometry(path)
        geometry.check_layout(parallel.layout)
        self._vocab_size = geometry.vocab_size
        self._temperature = temperature
        self._parallel = parallel
        transformer = transformer_config(
            geometry, parallel, replace(model, activation_recomputation="none")
        )
        self._parts = build_parts(geometry, parallel, transformer, path)
        for part in self._parts:
            part.to(device=parallel.device, dtype=dtype).requires_grad_(False)

    def full_logprobs(self, rows: Sequence[MicroBatch]) -> list[FullRow]:
        """Its log-probs of every kept label, over the whole distribution: a record for each row on
        the last pipeline stage, an empty list on the others.
        """
        return evaluate_rows(
            self._parts,
            rows,
            RowOutput.full_row,
            temperature=self._temperature,
            truncation=WHOLE,
            vocab_size=self._vocab_size,
            parallel=self._parallel,
            name="reference policy",
        )
