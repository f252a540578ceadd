"""Every setting of a run, with its default, in one place.

A run is a YAML file with `key=value` overrides: `load_config("configs/quickstart.yaml", ["loop.num_steps=50"])`.
Loading is strict: an unknown key, a wrong type or a rule between keys that does not hold is a ConfigError of one line
that names the key and the nearest valid one, before any process is started.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""  # Hugging Face checkpoint folder: config.json, tokenizer, *.safetensors
    dtype: str = "float32"  # of the learner: float32, bfloat16 (main weights stay float32)

    def __post_init__(self) -> None:
        _require(
            self.dtype in ("float32", "bfloat16"),
            f"model.dtype: expected float32 or bfloat16, got {self.dtype!r}",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1  # data parallel is what the world size leaves
    timeout_seconds: float = 600.0  # of every collective

    def __post_init__(self) -> None:
        _require(self.tensor >= 1, f"parallel.tensor: expected at least 1, got {self.tensor}")
        _require(self.pipeline >= 1, f"parallel.pipeline: expected at least 1, got {self.pipeline}")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One source of prompts: a reasoning-gym task, or a JSONL or Parquet file."""

    name: str = ""  # a reasoning-gym task; or any label when `path` is given
    path: str = ""  # JSONL or Parquet file
    weight: float = 1.0  # share in the mixture
    options: dict = field(default_factory=dict)  # the reasoning-gym task's own settings
    prompt_column: str = "question"  # a dotted path into the record, e.g. "metadata.expression"
    answer_column: str = "answer"  # e.g. "reward_model.ground_truth" (DAPO-Math-17k)
    template: str = "{prompt}"  # text around the prompt, before any chat template
    verifier: str = "auto"  # auto, reasoning_gym, exact, numeric, math_verify, or an import path "package.module:function"
    # auto: the task's own scorer for reasoning-gym, math_verify for files


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    tasks: list[TaskConfig] = field(default_factory=list)
    seed: int = 0
    held_out_seed: int = (
        1_000_003  # held-out prompts are drawn with it, and their texts never appear in training
    )
    num_held_out: int = 200
    max_prompt_tokens: int = 0  # 0: the model's context less rollout.max_tokens
    chat_template: str = "auto"  # auto: where the tokenizer has one; never; always

    def __post_init__(self) -> None:
        _require(
            self.chat_template in ("auto", "never", "always"),
            f"data.chat_template: expected auto, never or always, got {self.chat_template!r}",
        )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    num_workers: int = 2
    timeout_seconds: float = 10.0  # for one response; longer counts as "timeout", not as wrong
    truncated_reward: float | None = (
        None  # reward of a response cut at max_tokens; None: whatever the verifier says
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        _require(
            self.temperature > 0, f"sampling temperature: expected above 0, got {self.temperature}"
        )
        _require(
            self.max_tokens >= 1, f"sampling max_tokens: expected at least 1, got {self.max_tokens}"
        )
        _require(0 < self.top_p <= 1, f"sampling top_p: expected in (0, 1], got {self.top_p}")
        _require(self.top_k >= 0, f"sampling top_k: expected 0 (off) or more, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_engines: int = 1  # servers started by the run; 0 with `urls`
    urls: list[str] = field(
        default_factory=list
    )  # servers already running; their token comes from MEGATRON_RL_TOKEN
    dtype: str = "bfloat16"  # of the engine: float32, bfloat16
    kv_cache_dtype: str = "auto"
    max_model_len: int = 0  # 0: the model's own context
    max_num_seqs: int = 256
    kv_cache_gib: float = 1.0  # CPU engines: memory for the KV cache
    gpu_memory_utilization: float = 0.8  # CUDA engines
    num_threads: int = 0  # CPU engines: OpenMP threads; 0: vLLM decides
    port: int = 0  # first port of the started servers; 0: free ones
    startup_timeout_seconds: float = 300.0
    request_timeout_seconds: float = 300.0
    max_retries: int = 3
    max_in_flight: int = 64  # requests, per engine
    extra_args: list[str] = field(default_factory=list)  # appended to the server's command line
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _require(
            bool(self.urls) != (self.num_engines > 0),
            "rollout: give either urls of running servers and num_engines=0, or num_engines of 1 or more and no urls",
        )


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """DCMDP (arXiv 2606.08779): E[|p_train - p_inf|] <= tolerance, through one dual variable lambda."""

    enabled: bool = True  # False: plain GRPO, the discrepancy is only measured
    initial: float = 0.1  # lambda before the first step
    learning_rate: float = (
        1.0  # eta of lambda <- clip(lambda + eta * (mean discrepancy - tolerance))
    )
    tolerance: float = 0.0037
    minimum: float = 0.0
    maximum: float = 10.0


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    clip_low: float = 0.2
    clip_high: float = 0.24
    normalize: str = "token_mean"  # token_mean: over the global batch's kept tokens; sequence_mean: mean of sequences' means
    advantage_epsilon: float = 1e-6
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)

    def __post_init__(self) -> None:
        _require(
            self.normalize in ("token_mean", "sequence_mean"),
            f"objective.normalize: expected token_mean or sequence_mean, got {self.normalize!r}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    warmup_steps: int = 0
    decay: str = "constant"  # constant, linear, cosine (over loop.num_steps)
    distributed: bool = False  # Megatron's distributed optimizer: states sharded over DP


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    tokens_per_micro_batch: int = 4096  # T, the budget of a packed row
    mini_batches_per_step: int = 1  # optimizer steps on one batch of rollouts
    recompute: str = (
        "auto"  # auto: no separate forward pass when there is one optimizer step a batch; always
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _require(
            self.recompute in ("auto", "always"),
            f"learner.recompute: expected auto or always, got {self.recompute!r}",
        )


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    bucket_mib: float = 64.0  # memory of one bucket; the peak extra memory of an update
    timeout_seconds: float = (
        120.0  # of each call of an update; an engine left half-updated this long is poisoned
    )
    probe_num_tokens: int = 48  # tokens of the parity probe after each sync; 0: no probe
    probe_tolerance: float = (
        0.0  # largest mean |p_learner - p_engine| of the probe; 0: by precision (sync/probe.py)
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0  # steps between evaluations; 0: only before and after
    num_samples: int = 8  # k of avg@k and pass@k
    at_start: bool = True
    at_end: bool = True
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 10  # steps; 0: only at the end
    keep: int = 2
    save_hf: bool = True  # the final weights also as a Hugging Face checkpoint


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    num_steps: int = 100
    prompts_per_step: int = 64
    samples_per_prompt: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """`python -m megatron_rl.sft`: supervised next-token training on prompt and response, loss on the response."""

    num_steps: int = 200
    sequences_per_step: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    path: str = ""  # JSONL or Parquet file of prompt and response pairs; "": prompts and answers of data.tasks
    response_column: str = "response"
    output: str = ""  # folder of the Hugging Face checkpoint; "": <run_dir>/warm_start


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: str = "runs/default"
    resume: str = "auto"  # auto: go on from run_dir/checkpoints/latest if there is one; never; or a checkpoint folder
    replay: str = (
        ""  # a run's rollouts/ folder: train from its recorded rollouts, without an engine
    )
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
