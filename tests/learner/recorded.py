"""Recorded rollouts for tests, made without an engine: random tokens, mixed lengths, and log-probs
near the model's own.

    python -m tests.learner.recorded MODEL FOLDER      writes FOLDER/step_000001 and on

Among them: a group of equal rewards, a response with a gap in its mask (two turns), rollouts
without any response, and a prompt of one token whose rollout is that token alone. `sparse_groups`
is a batch of which one of two data-parallel ranks is dealt no kept token. Every response token has
a head, in which the sampled token is or is not.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_rl.learner.batch.deal import by_sample, deal_batch
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.update.step import train_step
from megatron_rl.objective.advantage import group_advantages
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import (
    Prompt,
    RecomputedRow,
    Rollout,
    RolloutGroup,
    RolloutHead,
    Sample,
    Score,
    ScoredGroup,
)
from megatron_rl.rollout.heads import without_heads
from megatron_rl.rollout.recording import read_step, write_step
from megatron_rl.weights.geometry import read_geometry

NUM_STEPS = 8
NUM_PROMPTS, NUM_SAMPLES = 4, 4
SPARSE_STEP = 99  # where the sparse batch stands, behind the steps of a replay
FIRST_TOKEN, LAST_TOKEN = 3, 97
LONGEST = 44  # tokens of a sequence
ENGINE_NOISE = 0.3  # standard deviation of rollout minus recomputed log-prob
NUM_HEAD = 6  # tokens of a head

Groups = list[RolloutGroup]
Scores = list[tuple[Score, ...]]


def mixed_groups(step: int, rng: random.Random) -> tuple[Groups, Scores]:
    """A step's groups, with log-probs of 0 still."""
    groups, scores = [], []
    for number in range(NUM_PROMPTS):
        is_bare = number == 3  # a prompt of one token
        prompt = _tokens(rng, 1 if is_bare else rng.randint(3, 12))
        rollouts = []
        for sample in range(NUM_SAMPLES):
            has_response = not (sample == 0 and number in (1, 3))
            response = _tokens(rng, rng.randint(1, 32)) if has_response else ()
            rollouts.append(_rollout(prompt, response, step, has_gap=sample == 3))
        index = (step - 1) * NUM_PROMPTS + number
        groups.append(RolloutGroup(prompt=_prompt(index, prompt), rollouts=tuple(rollouts)))
        is_equal = number == 2
        scores.append(tuple(_score(1.0 if is_equal else rng.random()) for _ in range(NUM_SAMPLES)))
    return groups, scores


def sparse_groups(rng: random.Random) -> tuple[Groups, Scores]:
    """Dealt to two ranks by length, the first gets the 40 tokens that nobody keeps, and no more."""
    groups, scores = [], []
    for number, lengths in enumerate(((40, 9), (20, 10))):
        prompt = _tokens(rng, 5)
        is_kept = number == 1
        rollouts = []
        for length in lengths:
            rollout = _rollout(prompt, _tokens(rng, length - 5), SPARSE_STEP, has_gap=False)
            if not is_kept:
                rollout = replace(
                    rollout, loss_mask=(False,) * length, weight_versions=(-1,) * length
                )
            rollouts.append(rollout)
        groups.append(RolloutGroup(prompt=_prompt(number, prompt), rollouts=tuple(rollouts)))
        scores.append((_score(1.0), _score(0.0)))
    return groups, scores


def _tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length))


def _prompt(index: int, token_ids: tuple[int, ...]) -> Prompt:
    return Prompt(index=index, source="recorded", text="", token_ids=token_ids, answer="")


def _score(reward: float) -> Score:
    return Score(reward=reward, is_formatted=True, failure=None)


def _rollout(
    prompt: tuple[int, ...], response: tuple[int, ...], step: int, *, has_gap: bool
) -> Rollout:
    kept = [not (has_gap and 2 <= position < 5) for position in range(len(response))]
    length = len(prompt) + len(response)
    version = step - 1
    return Rollout(
        token_ids=prompt + response,
        loss_mask=(False,) * len(prompt) + tuple(kept),
        rollout_logprobs=(0.0,) * length,
        weight_versions=(-1,) * len(prompt) + tuple(version if each else -1 for each in kept),
        finish_reason="stop",
        text="",
    )


def as_samples(groups: Sequence[RolloutGroup], scores: Sequence[Sequence[Score]]) -> list[Sample]:
    """One Sample a rollout, with its group's advantage."""
    samples = []
    for group, of_group in zip(groups, scores, strict=True):
        rewards = torch.tensor([score.reward for score in of_group], dtype=torch.float64)
        advantages = group_advantages(rewards).tolist()
        for index, (rollout, score, advantage) in enumerate(
            zip(group.rollouts, of_group, advantages, strict=True)
        ):
            samples.append(
                Sample(
                    prompt_index=group.prompt.index,
                    sample_index=index,
                    rollout=rollout,
                    reward=score.reward,
                    advantage=advantage,
                )
            )
    return samples


def read_samples(
    folder: Path, step: int, parallel: Parallel, *, has_heads: bool = False
) -> list[Sample]:
    """This replica's share of a recorded step, on its head; nothing elsewhere."""
    if not parallel.is_replica_head:
        return []
    recorded = read_step(folder, step)
    if not has_heads:
        recorded = without_heads(recorded)
    groups, scores = [each.group for each in recorded], [each.scores for each in recorded]
    start = len(groups) * parallel.dp_rank // parallel.dp_size
    stop = len(groups) * (parallel.dp_rank + 1) // parallel.dp_size
    return as_samples(groups[start:stop], scores[start:stop])


def train_on(
    learner: Learner,
    folder: Path,
    step: int,
    dual: DualVariable,
    *,
    num_mini_batches: int,
    tokens_per_row: int,
) -> dict[str, float]:
    """Train a step on a recorded one, by the default objective; its metrics."""
    batch = deal_batch(
        read_samples(folder, step, learner.parallel),
        learner.parallel,
        samples_per_prompt=NUM_SAMPLES,
        num_mini_batches=num_mini_batches,
        tokens_per_row=tokens_per_row,
    )
    report, _ = train_step(
        learner,
        batch,
        dual,
        ObjectiveConfig(),
        step=step,
        weight_version=step - 1,
        should_recompute=False,
    )
    return report.metrics


def record(model: Path, folder: Path) -> None:
    """Write all steps, with the log-probs of the model at hand and the engine's noise on them."""
    parallel = initialize_parallel(ParallelConfig(), seed=0)
    learner = Learner(
        ModelConfig(path=str(model)),
        OptimizerConfig(),
        read_geometry(model),
        parallel,
        num_updates=1,
    )
    rng = random.Random(5)
    steps = {step: mixed_groups(step, rng) for step in range(1, NUM_STEPS + 1)}
    steps[SPARSE_STEP] = sparse_groups(rng)
    chance = np.random.default_rng(6)  # of the heads
    for step, (groups, scores) in steps.items():
        groups = _with_rollouts(groups, lambda _, __, rollout: _with_head(rollout, chance))
        samples = as_samples(groups, scores)
        batch = deal_batch(
            samples,
            parallel,
            samples_per_prompt=len(groups[0].rollouts),
            num_mini_batches=1,
            tokens_per_row=256,
        )
        recomputed = learner.recompute(batch.mini_batches[0])
        known = {
            (sample.prompt_index, sample.sample_index): _with_noise(sample.rollout, values, rng)
            for sample, values in by_sample(recomputed)
        }
        heads = {key: head for row in recomputed for key, head in _noisy_heads(row, chance)}
        groups = _with_rollouts(groups, partial(_as_sampled, known, heads))
        judged = [
            ScoredGroup(group=group, scores=of_group).without_judgement()
            for group, of_group in zip(groups, scores, strict=True)
        ]
        write_step(folder, step, 0, judged, num_ranks=1)
    shut_down_parallel()


def _with_noise(rollout: Rollout, values: torch.Tensor, rng: random.Random) -> tuple[float, ...]:
    noisy = [
        min(0.0, value + rng.gauss(0.0, ENGINE_NOISE)) if kept else 0.0
        for value, kept in zip(values.tolist(), rollout.loss_mask)
    ]
    return tuple(torch.tensor(noisy, dtype=torch.float32).tolist())


def _with_rollouts(groups: Groups, change: Callable[[int, int, Rollout], Rollout]) -> Groups:
    """The groups, with every rollout changed by prompt index, sample index and itself."""
    return [
        replace(
            group,
            rollouts=tuple(
                change(group.prompt.index, index, rollout)
                for index, rollout in enumerate(group.rollouts)
            ),
        )
        for group in groups
    ]


def _as_sampled(
    known: dict[tuple[int, int], tuple[float, ...]],
    heads: dict[tuple[int, int], RolloutHead],
    prompt: int,
    sample: int,
    rollout: Rollout,
) -> Rollout:
    key = prompt, sample
    return replace(rollout, rollout_logprobs=known[key], head=heads.get(key))


def _with_head(rollout: Rollout, chance: np.random.Generator) -> Rollout:
    """Tokens of a head for every response token: every other head holds the sampled one."""
    sampled = [token for token, kept in zip(rollout.token_ids, rollout.loss_mask) if kept]
    if not sampled:
        return rollout
    ids = []
    for place, token in enumerate(sampled):
        others = [each for each in range(FIRST_TOKEN, LAST_TOKEN) if each != token]
        drawn = chance.choice(others, NUM_HEAD, replace=False)
        if place % 2:
            drawn[place % NUM_HEAD] = token
        ids.append(drawn)
    token_ids = np.array(ids, dtype=np.int32)
    return replace(
        rollout, head=RolloutHead(token_ids=token_ids, logprobs=np.zeros(token_ids.shape, "f4"))
    )


def _noisy_heads(
    row: RecomputedRow, chance: np.random.Generator
) -> Iterator[tuple[tuple[int, int], RolloutHead]]:
    """Each sample's head with the learner's log-probs and noise, by prompt and sample index; a last
    entry is absent now and then.
    """
    micro_batch = row.micro_batch
    for number, sample in enumerate(micro_batch.samples):
        is_own = micro_batch.loss_mask & (micro_batch.sequence_ids == number)
        if not is_own.any():
            continue
        logprobs = row.recomputed_head_logprobs[is_own].numpy()
        logprobs = (logprobs + chance.normal(0, ENGINE_NOISE, logprobs.shape)).astype(np.float32)
        token_ids = sample.rollout.head.token_ids.copy()
        token_ids[::5, -1], logprobs[::5, -1] = -1, -np.inf
        key = (sample.prompt_index, sample.sample_index)
        yield key, RolloutHead(token_ids=token_ids, logprobs=np.minimum(logprobs, 0.0))


if __name__ == "__main__":
    record(Path(sys.argv[1]), Path(sys.argv[2]))
