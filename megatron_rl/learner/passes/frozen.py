"""[door: megatron] A frozen reference policy beside the learner: a checkpoint's weights in the same
layout, for the log-probs that a KL term compares with.

It has no gradients, no optimizer and no place in the run's checkpoints; its memory is one copy of
the weights in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rl.config import ModelConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import DTYPES, build_gpt, load_weights, transformer_config
from megatron_rl.learner.passes.recompute import recompute_logprobs
from megatron_rl.records import MicroBatch
from megatron_rl.weights.geometry import read_geometry
from megatron_rl.weights.huggingface import CheckpointReader


class Reference:
    """The model of `path` on this rank of `parallel`, never trained."""

    def __init__(
        self, path: str | Path, model: ModelConfig, parallel: Parallel, *, temperature: float
    ) -> None:
        """
        Args:
            path: Hugging Face checkpoint folder.
            model: for the dtype.
            temperature: of the policy, at which the log-probs are taken.
        """
        dtype = DTYPES[model.dtype]
        geometry = read_geometry(path)
        geometry.check_layout(parallel.tp_size, parallel.pp_size)
        self._vocab_size = geometry.vocab_size
        self._temperature = temperature
        self._parallel = parallel
        transformer = transformer_config(geometry, parallel, dtype)
        self._model = build_gpt(geometry, parallel, transformer, path)
        load_weights(self._model, geometry, parallel, CheckpointReader(path))
        self._model.to(device=parallel.device, dtype=dtype).requires_grad_(False)

    def logprobs(self, rows: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Of every kept label: on the last stage a [T] float32 a row, elsewhere nothing."""
        return recompute_logprobs(
            self._model,
            rows,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
            parallel=self._parallel,
        )
