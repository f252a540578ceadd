"""Sampling seeds. They depend on run, step and prompt, never on a rank or an engine."""

from __future__ import annotations

import hashlib

from megatron_rl.records import SAMPLE_BITS


def sampling_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """The seed of a prompt's samples in a step: 63 bits, of which the low SAMPLE_BITS are zero.

    Sample j is drawn with this seed plus j. torch's CPU generator uses only the low 32 bits of a
    seed. In these bits, the seeds of consecutive prompts are 2**SAMPLE_BITS apart, so that within a
    step no two prompts share a sample's seed. The seed of prompt 0 is a hash, and so are the bits
    above the low 32, which CUDA's generator uses as well.
    """
    start = _hash(run_seed, step) + prompt_index
    low_bits = 32 - SAMPLE_BITS
    low = (start % 2**low_bits) << SAMPLE_BITS
    return (_hash(run_seed, step, prompt_index) % 2**31) << 32 | low


def _hash(*numbers: int) -> int:
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
