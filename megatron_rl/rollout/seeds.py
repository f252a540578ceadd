"""Sampling seeds. They depend on the run, the prompt, and the step or the evaluation set, never on
a rank or an engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from megatron_rl.records import SAMPLE_BITS

# All evaluations use the seeds of this step, so that two of them differ only in the weights.
EVAL_STEP = -1
# Prompts of one step or evaluation whose seeds differ in the low 32 bits.
_NUM_PLACES = 2 ** (32 - SAMPLE_BITS)


def sampling_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """The seed of a prompt's samples in a step: 63 bits, of which the low SAMPLE_BITS are zero.

    Sample j is drawn with this seed plus j. torch's CPU generator uses only the low 32 bits of a
    seed. In these bits, the seeds of consecutive prompts are 2**SAMPLE_BITS apart, so that within a
    step no two prompts share a sample's seed. The seed of prompt 0 is a hash, and so are the bits
    above the low 32, which CUDA's generator uses as well.
    """
    return _seed(_hash(run_seed, step) + prompt_index, _hash(run_seed, step, prompt_index))


def evaluation_seeds(run_seed: int, indices: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The seeds of the prompts of evaluation sets, as `sampling_seed` makes them. No two prompts
    share a sample's seed, also not in the low 32 bits, and also not if they are of two sets.

    The seeds of a set depend on its name, so that they remain the same when other sets are added or
    left out. (If its hash runs into the seeds of a set before it, which is rare, it gets another.)

    Args:
        indices: for each set the indices of its prompts; the set "", of the held-out prompts, has
            the seeds of step EVAL_STEP.

    Raises:
        ValueError: there are more prompts than different seeds.
    """
    if sum(map(len, indices.values())) > _NUM_PLACES // 2:
        raise ValueError(f"expected at most {_NUM_PLACES // 2} prompts in all evaluation sets")
    taken: set[int] = set()
    seeds: dict[str, list[int]] = {}
    for name, of_set in indices.items():
        attempt = 0
        while True:
            key = (EVAL_STEP, name, attempt) if name or attempt else (EVAL_STEP,)
            start = _hash(run_seed, *key)
            places = {(start + index) % _NUM_PLACES for index in of_set}
            if taken.isdisjoint(places):
                break
            attempt += 1
        taken |= places
        seeds[name] = [_seed(start + index, _hash(run_seed, *key, index)) for index in of_set]
    return seeds


def piece_seed(seed: int, piece: int) -> int:
    """The seed of piece 1, 2, ... of a sample that is sampled by several requests, from the seed of
    the sample: 63 bits. Its random numbers do not repeat those of the first piece.
    """
    return _hash(seed, piece) % 2**63


def _seed(place: int, high: int) -> int:
    return (high % 2**31) << 32 | (place % _NUM_PLACES) << SAMPLE_BITS


def _hash(*parts: int | str) -> int:
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
