"""A batch with every kind of response that is not learnt from, for all presets.

Two mini-batches of three groups of two. In the first are two plain responses; one whose tokens are
all masked and one without a token; and one far from the learner, which some presets reject, beside
one that the verifier could not score. In the second nothing can be learnt: all is masked or empty.

Dealt to two ranks by length, the first gets the masked response of the first mini-batch and nothing
else of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.records import Rollout, RolloutHead, Sample

NUM_SAMPLES, NUM_MINI_BATCHES, TOKENS_PER_ROW = 2, 2, 128
PLAIN, MASKED, EMPTY, FAR, FAILED = "plain", "masked", "empty", "far", "failed"
# (kind, tokens) of both responses to each prompt
GROUPS = (
    ((PLAIN, 12), (PLAIN, 11)),
    ((MASKED, 40), (EMPTY, 5)),
    ((FAR, 10), (FAILED, 14)),
    ((MASKED, 9), (MASKED, 8)),
    ((EMPTY, 4), (EMPTY, 3)),
    ((MASKED, 7), (EMPTY, 2)),
)
NUM_LEFT_OUT = (1, 0)
PROMPT_LENGTH = 2
FAR_DISTANCE = 3.0  # rollout minus recomputed log-prob of a far response
# The plain responses' are this far apart, up and down in turn, so that their mean stays at 0.
NEAR_DISTANCE = 2**-12
LENGTH = 32  # of normalize=constant
HEAD_LOGPROBS = (-2.5, -3.0, -4.0)  # of the tokens 3, 4 and 5 at every response token


def kind_of(sample: Sample) -> str:
    """The kind of a response of the batch."""
    return GROUPS[sample.prompt_index][sample.sample_index][0]


def edge_samples(*, has_heads: bool = False) -> list[Sample]:
    """All responses, in order; their log-probs are 0 still."""
    return [
        _sample(prompt, index, kind, length, has_heads=has_heads)
        for prompt, group in enumerate(GROUPS)
        for index, (kind, length) in enumerate(group)
    ]


def _head(num_tokens: int) -> RolloutHead:
    shape = (num_tokens, len(HEAD_LOGPROBS))
    return RolloutHead(
        token_ids=np.broadcast_to(np.arange(3, 6, dtype=np.int32), shape).copy(),
        logprobs=np.broadcast_to(np.array(HEAD_LOGPROBS, dtype=np.float32), shape).copy(),
    )


def _sample(prompt: int, index: int, kind: str, length: int, *, has_heads: bool) -> Sample:
    is_response = [kind in (PLAIN, FAR, FAILED) and n >= PROMPT_LENGTH for n in range(length)]
    return Sample(
        prompt_index=prompt,
        sample_index=index,
        rollout=Rollout(
            token_ids=tuple(3 + (7 * n + 11 * prompt + 5 * index) % 90 for n in range(length)),
            loss_mask=tuple(is_response),
            rollout_logprobs=(0.0,) * length,
            weight_versions=tuple(0 if each else -1 for each in is_response),
            finish_reason="stop",
            text="",
            head=_head(sum(is_response)) if has_heads and any(is_response) else None,
        ),
        reward=0.0,
        advantage=0.0 if kind == FAILED else 1.0 - 1.5 * index,
        is_kept=kind != FAILED,
    )


def preset_configs(folder: Path, names: Iterator[str]) -> dict[str, Config]:
    """The settings of each preset over the defaults."""
    path = folder / "presets.yaml"
    path.write_text(f"rollout: {{sampling: {{max_tokens: {LENGTH}}}}}\n")
    return {name: load_config(path, [f"objective.preset={name}"]) for name in names}
