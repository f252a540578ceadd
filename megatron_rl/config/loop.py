"""Settings of the training loop: steps, weight sync and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.choices import TRANSPORTS, RunningRequests
from megatron_rl.config.rules import (
    MAX_PROMPTS,
    above_zero,
    at_least,
    at_most,
    literal_choices,
    one_of,
)
from megatron_rl.records import MAX_SAMPLES


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingConfig:
    """Groups whose responses all have the same score from the verifier are dropped, and others are
    sampled in their place (DAPO, arXiv 2503.14476).
    """

    enabled: bool = False
    # largest number of sampling rounds in a step; then the step trains on the groups kept so far
    max_rounds: int = 10

    def __post_init__(self) -> None:
        at_least(1, max_rounds=self.max_rounds)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How many steps a run takes, and how large the batch of a step is."""

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
        at_most(MAX_PROMPTS, prompts_per_step=self.prompts_per_step)


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How the learner's weights reach the engines."""

    # steps between two publications of weights; rollouts are sampled with weights that are 0 to
    # every - 1 steps old. checkpoint.every, eval.every and loop.num_steps must be multiples of it,
    # so that checkpoints, evaluations and the last step coincide with a publication
    every: int = 1
    transport: str = "shared_memory"  # a module of sync/transports/
    # with rollout.max_policy_age above 0: requests that run when weights are published end first
    # (wait), or go on with the new weights, either with the key-value cache of the old weights
    # (keep) or after it was computed again (recompute)
    running_requests: RunningRequests = "wait"
    # memory of one bucket; an update needs one (shared_memory, ipc) or two (collective)
    bucket_mib: float = 64.0
    # timeout of each call of an update; an engine that is half-updated for longer is poisoned
    timeout_seconds: float = 120.0
    probe_num_tokens: int = 48  # tokens of the parity probe after each sync; 0: no probe
    # largest mean |p_learner - p_engine| of the probe; 0: a bound that depends on the precision
    # (sync/probe.py)
    probe_tolerance: float = 0.0

    def __post_init__(self) -> None:
        one_of("transport", self.transport, TRANSPORTS)
        literal_choices(self)
        at_least(1, every=self.every)
        above_zero(bucket_mib=self.bucket_mib, timeout_seconds=self.timeout_seconds)
        at_least(0, probe_num_tokens=self.probe_num_tokens, probe_tolerance=self.probe_tolerance)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many of them are kept."""

    every: int = 10  # steps; 0: only at the end
    keep: int = 2
    # a step is held for the copy of the state to host memory alone, and a thread of each rank
    # writes it; False: the step is held until the checkpoint is complete
    asynchronous: bool = True
    save_hf: bool = True  # write the final weights as a Hugging Face checkpoint as well
    # steps between Hugging Face checkpoints of the weights on the way, in huggingface_steps/; all
    # of them are kept; 0: none
    hf_every: int = 0

    def __post_init__(self) -> None:
        at_least(0, every=self.every, hf_every=self.hf_every)
        at_least(1, keep=self.keep)
