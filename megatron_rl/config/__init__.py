"""Every setting of a run, with its default, in one place.

A run is a YAML file with `key=value` overrides, read by `megatron_rl.config.file.load_config`:
`load_config("configs/quickstart.yaml", ["loop.num_steps=50"])`. Loading is strict: an unknown key,
a wrong type or a rule between keys that does not hold is a ConfigError of one line that names the
key and the nearest valid one, before any process is started.

A rule of one section names its keys without the section; the loader puts the section before them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.data import DataConfig, RewardConfig, TaskConfig
from megatron_rl.config.learner import LearnerConfig, OptimizerConfig, WarmStartConfig
from megatron_rl.config.loop import CheckpointConfig, LoopConfig, SyncConfig
from megatron_rl.config.model import ModelConfig, ParallelConfig
from megatron_rl.config.objective import ConstraintConfig, ObjectiveConfig
from megatron_rl.config.rollout import EvalConfig, QuantizationConfig, RolloutConfig, SamplingConfig
from megatron_rl.config.rules import check_between_sections, require

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConstraintConfig",
    "DataConfig",
    "EvalConfig",
    "LearnerConfig",
    "LoopConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "QuantizationConfig",
    "RewardConfig",
    "RolloutConfig",
    "SamplingConfig",
    "SyncConfig",
    "TaskConfig",
    "WarmStartConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: str = "runs/default"
    # auto: go on from run_dir/checkpoints/latest if there is one; never; or a checkpoint folder
    resume: str = "auto"
    # a run's rollouts/ folder: train from its recorded rollouts, without an engine
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
    loop: LoopConfig = field(default_factory=LoopConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir: expected a folder, got an empty text")
        require(bool(self.resume), "resume: expected auto, never or a folder, got an empty text")
        check_between_sections(self)
