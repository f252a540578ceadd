"""Every setting of a run, with its default, in one place.

A run is a YAML file with `key=value` overrides, read by `megatron_rl.config.file.load_config`:
`load_config("configs/quickstart.yaml", ["loop.num_steps=50"])`. Loading is strict: an unknown key,
a wrong type or a broken rule between keys is a ConfigError of one line that names the key and the
nearest valid one, before any process is started. `objective.preset=NAME` applies the settings of a
published method.

A rule within a section names its keys without the section; the loader adds the section's name as a
prefix. Rules between sections are in this file, next to `Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.correction import (
    ImportanceConfig,
    RejectionConfig,
    ScoreCenteringConfig,
)
from megatron_rl.config.data import (
    DataConfig,
    OverlongConfig,
    QuestionsConfig,
    RewardConfig,
    RewardTerm,
    TaskConfig,
)
from megatron_rl.config.evaluation import EvalConfig, EvalSetConfig
from megatron_rl.config.learner import LearnerConfig, OptimizerConfig, WarmStartConfig
from megatron_rl.config.loop import CheckpointConfig, DynamicSamplingConfig, LoopConfig, SyncConfig
from megatron_rl.config.model import (
    FP8_POSITIONS,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
)
from megatron_rl.config.objective import (
    AcceptanceConfig,
    ConstraintConfig,
    KLConfig,
    ObjectiveConfig,
)
from megatron_rl.config.rollout import (
    EnvironmentConfig,
    QuantizationConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.config.rules import require
from megatron_rl.config.tracking import TrackingConfig
from megatron_rl.records import MAX_SAMPLES

__all__ = [
    "AcceptanceConfig",
    "CheckpointConfig",
    "Config",
    "ConstraintConfig",
    "DataConfig",
    "DynamicSamplingConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "EvalSetConfig",
    "ImportanceConfig",
    "KLConfig",
    "KernelConfig",
    "LearnerConfig",
    "LoopConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "ParallelConfig",
    "QuantizationConfig",
    "QuestionsConfig",
    "RejectionConfig",
    "RewardConfig",
    "RewardTerm",
    "RolloutConfig",
    "SamplingConfig",
    "ScoreCenteringConfig",
    "SyncConfig",
    "TaskConfig",
    "TrackingConfig",
    "WarmStartConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    run_dir: str = "runs/default"
    # auto: continue from run_dir/checkpoints/latest if there is one; never; or a checkpoint folder
    resume: str = "auto"
    # a run's rollouts/ folder: train on its recorded rollouts, without an engine; "": sample
    replay: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir: expected a folder, got an empty text")
        require(bool(self.resume), "resume: expected auto, never or a folder, got an empty text")
        _check_publications(self.sync, self.checkpoint, self.eval, self.loop)
        _check_lengths(self.rollout, self.eval, self.data, self.reward, self.learner)
        _check_batches(self.loop, self.rollout, self.eval, self.learner)
        _check_timeouts(self.rollout, self.parallel)
        _check_updates(self.learner, self.loop)
        _check_rows(self.learner, self.parallel)
        _check_fp8_rows(self.model, self.parallel)
        _check_ahead(self.rollout, self.sync, self.objective.acceptance)
        if self.objective.acceptance.enabled:
            _check_acceptance(self.replay, self.rollout.sampling, self.sync)
        constraint = self.objective.constraint
        if constraint.enabled and constraint.tolerance_above == "fresh_gap":
            _check_fresh_gap(
                self.replay, self.sync, self.rollout.sampling, self.objective, self.learner
            )


def _check_publications(
    sync: SyncConfig, checkpoint: CheckpointConfig, evaluation: EvalConfig, loop: LoopConfig
) -> None:
    """Checkpoints, evaluations and the last step must coincide with a publication."""
    for key, steps in (
        ("checkpoint.every", checkpoint.every),
        ("eval.every", evaluation.every),
        ("loop.num_steps", loop.num_steps),
    ):
        require(
            steps % sync.every == 0,
            f"{key}: expected a multiple of sync.every={sync.every}, since only then do the "
            f"engines serve the step's weights, got {steps}",
        )


def _check_lengths(
    rollout: RolloutConfig,
    evaluation: EvalConfig,
    data: DataConfig,
    reward: RewardConfig,
    learner: LearnerConfig,
) -> None:
    """Prompts and responses must fit into the learner's rows and the engines' context."""
    buffer_tokens, max_tokens = reward.overlong.buffer_tokens, rollout.sampling.max_tokens
    require(
        buffer_tokens <= max_tokens,
        f"reward.overlong.buffer_tokens: expected at most rollout.sampling.max_tokens={max_tokens},"
        f" got {buffer_tokens}",
    )
    longest = max_tokens + max(data.max_prompt_tokens, 1)
    require(
        longest <= learner.tokens_per_micro_batch,
        "learner.tokens_per_micro_batch: expected room for the longest prompt and response, "
        f"{longest} tokens (data.max_prompt_tokens, rollout.sampling.max_tokens), "
        f"got {learner.tokens_per_micro_batch}",
    )
    samplings = {"": evaluation.sampling}
    samplings |= {f"{key}.": each.sampling for key, each in evaluation.used_sets().items()}
    for key, sampling in samplings.items():
        require(
            rollout.max_model_len == 0 or sampling.max_tokens < rollout.max_model_len,
            f"eval.{key}sampling.max_tokens: expected below rollout.max_model_len="
            f"{rollout.max_model_len}, got {sampling.max_tokens}",
        )


def _check_batches(
    loop: LoopConfig, rollout: RolloutConfig, evaluation: EvalConfig, learner: LearnerConfig
) -> None:
    """A step must have enough sequences for its mini-batches, and an engine must be able to hold a
    group in flight.
    """
    sequences = loop.prompts_per_step * loop.samples_per_prompt
    require(
        learner.mini_batches_per_step <= sequences,
        f"learner.mini_batches_per_step: expected at most the {sequences} sequences of a step "
        f"(loop), got {learner.mini_batches_per_step}",
    )
    together = {
        "loop.samples_per_prompt": loop.samples_per_prompt,
        "eval.num_samples": evaluation.num_samples,
    }
    together |= {
        f"eval.{key}.num_samples": each.num_samples for key, each in evaluation.used_sets().items()
    }
    for key, num_samples in together.items():
        turns = rollout.environment.max_turns
        require(
            rollout.environment.name == "single_turn" or num_samples * turns <= MAX_SAMPLES,
            f"rollout.environment.max_turns: expected at most {MAX_SAMPLES} / {key}={num_samples}, "
            f"the seeds of a prompt, got {turns}",
        )
        require(
            num_samples <= rollout.max_num_seqs,
            f"rollout.max_num_seqs: expected at least {key}={num_samples}, which an engine samples "
            f"together, got {rollout.max_num_seqs}",
        )


def _check_timeouts(rollout: RolloutConfig, parallel: ParallelConfig) -> None:
    """The timeout of a collective must be longer than anything other ranks do in the meantime."""
    for key in ("startup_timeout_seconds", "request_timeout_seconds"):
        seconds = getattr(rollout, key)
        require(
            seconds < parallel.timeout_seconds,
            f"parallel.timeout_seconds: expected above rollout.{key}={seconds:g}, which other "
            f"ranks wait for in a collective, got {parallel.timeout_seconds:g}",
        )


def _check_updates(learner: LearnerConfig, loop: LoopConfig) -> None:
    """A decaying learning rate must have updates left after its warm-up."""
    optimizer, num_updates = learner.optimizer, loop.num_steps * learner.mini_batches_per_step
    require(
        optimizer.decay == "constant" or optimizer.warmup_steps < max(num_updates, 1),
        f"learner.optimizer.warmup_steps: expected below the {num_updates} optimizer updates "
        "(loop.num_steps x learner.mini_batches_per_step) with "
        f"decay={optimizer.decay}, got {optimizer.warmup_steps}",
    )


def _check_rows(learner: LearnerConfig, parallel: ParallelConfig) -> None:
    """The ranks that share a row must get equal parts of it."""
    multiple = parallel.row_multiple
    require(
        learner.tokens_per_micro_batch % multiple == 0,
        f"learner.tokens_per_micro_batch: expected a multiple of {multiple}, because several ranks "
        "share a row (parallel.sequence_parallel, context, row_alignment), got "
        f"{learner.tokens_per_micro_batch}",
    )


def _check_fp8_rows(model: ModelConfig, parallel: ParallelConfig) -> None:
    """FP8 matrix products need rows of certain lengths on every rank."""
    multiple = FP8_POSITIONS[model.kernels.fp8]
    require(
        parallel.row_alignment % multiple == 0,
        f"parallel.row_alignment: expected a multiple of {multiple}, the positions that FP8 "
        f"products need (model.kernels.fp8={model.kernels.fp8}), got {parallel.row_alignment}",
    )


def _check_ahead(rollout: RolloutConfig, sync: SyncConfig, acceptance: AcceptanceConfig) -> None:
    """Rollouts sampled ahead need a publication in every step, one for each version."""
    age, key = rollout.max_policy_age, "rollout.max_policy_age"
    require(
        age > 0 or sync.running_requests == "wait",
        f"sync.running_requests: expected wait with {key}=0, where no request runs when weights "
        f"are published, got {sync.running_requests}",
    )
    require(
        age == 0 or sync.every == 1,
        f"sync.every: expected 1 with {key}={age}, since the age is counted in publications, got "
        f"{sync.every}",
    )
    require(
        age == 0 or not acceptance.enabled,
        f"objective.acceptance.enabled: expected false with {key}={age}, since rollouts would be "
        "sampled by an update that is taken back, got true",
    )


def _check_fresh_gap(
    replay: str,
    sync: SyncConfig,
    sampling: SamplingConfig,
    objective: ObjectiveConfig,
    learner: LearnerConfig,
) -> None:
    """The parity probe must be able to measure the gap of fresh weights, as the one of a step."""
    key = "objective.constraint.tolerance_above"
    require(
        not replay,
        f"{key}: expected zero in a replay, which has no engines to measure a gap, got fresh_gap",
    )
    require(
        sync.probe_num_tokens > 0,
        f"{key}: expected zero with sync.probe_num_tokens=0, since the parity probe measures the "
        "gap, got fresh_gap",
    )
    require(
        not sampling.is_truncated,
        f"{key}: expected zero with a truncated rollout.sampling, since the parity probe measures "
        f"the gap over the whole distribution, got fresh_gap with "
        f"{sampling.truncation_text}",
    )
    require(
        learner.moe.routing_replay != "rollout",
        f"{key}: expected zero with learner.moe.routing_replay=rollout, since the parity probe "
        "measures the gap with the learner's own routes, got fresh_gap",
    )
    require(
        not objective.acceptance.enabled,
        f"{key}: expected zero with objective.acceptance.enabled=true, since the gap would be that "
        "of weights that are taken back, got fresh_gap",
    )


def _check_acceptance(replay: str, sampling: SamplingConfig, sync: SyncConfig) -> None:
    """An update can be taken back only where engines score it, each update on its own."""
    key = "objective.acceptance.enabled"
    require(
        not replay,
        f"{key}: expected false in a replay, which has no engines to score an update, got true",
    )
    require(
        sync.every == 1,
        f"{key}: expected false with sync.every={sync.every}, since an update that is not published"
        " cannot be scored by the engines, got true",
    )
    # An engine scores given tokens over the whole vocabulary at temperature 1.
    require(
        sampling.temperature == 1 and not sampling.is_truncated,
        f"{key}: expected rollout.sampling with temperature=1 and nothing truncated, got "
        f"temperature={sampling.temperature:g}, {sampling.truncation_text}",
    )
