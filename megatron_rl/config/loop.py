"""The loop around the update: steps, weight sync, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.rules import above_zero, at_least, at_most
from megatron_rl.records import MAX_SAMPLES


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingConfig:
    """DAPO (arXiv 2503.14476): groups without signal are dropped, and others sampled for them."""

    enabled: bool = False
    max_rounds: int = 10  # of sampling in a step; what is kept by then is learnt from

    def __post_init__(self) -> None:
        at_least(1, max_rounds=self.max_rounds)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    num_steps: int = 100
    prompts_per_step: int = 64
    samples_per_prompt: int = 8
    seed: int = 0
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)

    def __post_init__(self) -> None:
        at_least(0, num_steps=self.num_steps, seed=self.seed)
        at_least(1, prompts_per_step=self.prompts_per_step)
        at_least(2, samples_per_prompt=self.samples_per_prompt)  # a group of 1 has no advantage
        at_most(MAX_SAMPLES, samples_per_prompt=self.samples_per_prompt)


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    # steps between two publications: rollouts are sampled by weights 0 to every - 1 steps old.
    # checkpoint.every, eval.every and loop.num_steps are multiples of it, so that a run goes on
    # with the weights that the engines served
    every: int = 1
    bucket_mib: float = 64.0  # memory of one bucket; the peak extra memory of an update
    # of each call of an update; an engine left half-updated this long is poisoned
    timeout_seconds: float = 120.0
    probe_num_tokens: int = 48  # tokens of the parity probe after each sync; 0: no probe
    # largest mean |p_learner - p_engine| of the probe; 0: by precision (sync/probe.py)
    probe_tolerance: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, every=self.every)
        above_zero(bucket_mib=self.bucket_mib, timeout_seconds=self.timeout_seconds)
        at_least(0, probe_num_tokens=self.probe_num_tokens, probe_tolerance=self.probe_tolerance)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 10  # steps; 0: only at the end
    keep: int = 2
    save_hf: bool = True  # the final weights also as a Hugging Face checkpoint

    def __post_init__(self) -> None:
        at_least(0, every=self.every)
        at_least(1, keep=self.keep)
