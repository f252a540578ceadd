"""Prompts and judged groups for the tests of this folder."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch

from megatron_rl.records import (
    JudgedGroup,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutHead,
    Score,
)


def make_prompt(index: int) -> Prompt:
    """A prompt of three tokens, with everything that is hard to write to a file."""
    return Prompt(
        index=index,
        source="sum",
        text='say "ü"\n',
        token_ids=(1, 5 + index, 9),
        answer="7",
        metadata={"difficulty": {"digits": 2}, "list": [1, 2.5, None]},
    )


def make_group(index: int, num_samples: int = 3) -> JudgedGroup:
    """Random tokens, float32 log-probs, a failed verifier, an advantage for each rollout."""
    chance = random.Random(index)
    prompt = make_prompt(index)
    rollouts = []
    for sample in range(num_samples):
        length = chance.randrange(1, 6)
        float32 = torch.tensor([-chance.random() for _ in range(length)]).tolist()
        rollouts.append(
            Rollout(
                token_ids=prompt.token_ids + tuple(chance.randrange(128) for _ in range(length)),
                loss_mask=(False,) * 3 + (True,) * length,
                rollout_logprobs=(0.0,) * 3 + tuple(float32),
                weight_versions=(-1,) * 3 + (4,) * length,
                finish_reason="length",
                text="line\u2028one\r\n日本 \ud800"[: length + 9],
                engine=f"http://127.0.0.1:{18400 + sample}",
            )
        )
    return JudgedGroup(
        group=RolloutGroup(prompt=prompt, rollouts=tuple(rollouts)),
        scores=tuple(
            Score(
                reward=chance.random(),
                is_formatted=sample != 1,
                failure="timeout" if sample else None,
                group_reward=chance.uniform(-1, 1),
                verifier_rewards=(("exact", chance.random()), ("own:fn", -0.1)),
            )
            for sample in range(num_samples)
        ),
        overlong_penalties=(0.0,) * num_samples,
        advantages=tuple(chance.gauss(0, 1) for _ in range(num_samples)),
        is_kept=(True,) * num_samples,
        has_signal=True,
    )


def with_heads(judged: JudgedGroup, num_logprobs: int) -> JudgedGroup:
    """The group with random heads of so many tokens; a last one is absent now and then."""
    chance = np.random.default_rng(judged.group.prompt.index)
    rollouts = []
    for rollout in judged.group.rollouts:
        shape = (rollout.num_response_tokens, num_logprobs)
        token_ids = chance.integers(0, 128, shape, dtype=np.int32)
        logprobs = -chance.random(shape, dtype=np.float32)
        token_ids[::2, -1], logprobs[::2, -1] = -1, -np.inf
        head = RolloutHead(token_ids=token_ids, logprobs=logprobs) if shape[0] else None
        rollouts.append(replace(rollout, head=head))
    return replace(judged, group=replace(judged.group, rollouts=tuple(rollouts)))
