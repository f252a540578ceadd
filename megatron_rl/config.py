"""Every setting of a run, with its default, in one place.

A run is a YAML file with `key=value` overrides, read by `megatron_rl.config_file.load_config`:
`load_config("configs/quickstart.yaml", ["loop.num_steps=50"])`. Loading is strict: an unknown key,
a wrong type or a rule between keys that does not hold is a ConfigError of one line that names the
key and the nearest valid one, before any process is started.

A rule of one section names its keys without the section; the loader puts the section before them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config_rules import (
    above_zero,
    at_least,
    at_most,
    check_between_sections,
    one_of,
    require,
)
from megatron_rl.records import MAX_SAMPLES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""  # Hugging Face checkpoint folder: config.json, tokenizer, *.safetensors
    dtype: str = "float32"  # of the learner: float32, bfloat16 (main weights stay float32)

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1  # data parallel is what the world size leaves
    # of every collective; ranks that talk to no engine wait in one while others start engines,
    # sample, score and evaluate
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        at_least(1, tensor=self.tensor, pipeline=self.pipeline)
        above_zero(timeout_seconds=self.timeout_seconds)


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
    # auto (the task's own scorer for reasoning-gym, math_verify for files), reasoning_gym, exact,
    # numeric, math_verify, or an import path "package.module:function"
    verifier: str = "auto"

    @property
    def source(self) -> str:
        """What its prompts, their verifier and their metrics are called: the name, or the file's
        stem.
        """
        return self.name or Path(self.path).stem

    def __post_init__(self) -> None:
        require(
            bool(self.name or self.path),
            "name: expected a reasoning-gym task, or a label with path, got neither",
        )
        above_zero(weight=self.weight)
        require(
            "{prompt}" in self.template,
            f"template: expected a text with {{prompt}} in it, got {self.template!r}",
        )
        require(
            self.verifier in ("auto", "reasoning_gym", "exact", "numeric", "math_verify")
            or ":" in self.verifier,
            "verifier: expected auto, reasoning_gym, exact, numeric, math_verify or "
            f'"package.module:function", got {self.verifier!r}',
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    tasks: list[TaskConfig] = field(default_factory=list)
    seed: int = 0
    # held-out prompts are drawn with it, and their texts never appear in training
    held_out_seed: int = 1_000_003
    num_held_out: int = 200
    max_prompt_tokens: int = 0  # 0: the model's context less rollout.sampling.max_tokens
    chat_template: str = "auto"  # auto: where the tokenizer has one; never; always

    def __post_init__(self) -> None:
        one_of("chat_template", self.chat_template, ("auto", "never", "always"))
        at_least(
            0,
            seed=self.seed,
            held_out_seed=self.held_out_seed,
            num_held_out=self.num_held_out,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        require(
            self.held_out_seed != self.seed,
            f"held_out_seed: expected another seed than data.seed, got {self.held_out_seed}",
        )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    num_workers: int = 2
    timeout_seconds: float = 10.0  # for one response; longer counts as "timeout", not as wrong
    # reward of a response cut at max_tokens; null: whatever the verifier says
    truncated_reward: float | None = None

    def __post_init__(self) -> None:
        at_least(1, num_workers=self.num_workers)
        above_zero(timeout_seconds=self.timeout_seconds)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        above_zero(temperature=self.temperature)
        at_least(1, max_tokens=self.max_tokens)
        require(0 < self.top_p <= 1, f"top_p: expected in (0, 1], got {self.top_p:g}")
        require(self.top_k >= 0, f"top_k: expected 0 (off) or more, got {self.top_k}")
        require(0 <= self.min_p < 1, f"min_p: expected in [0, 1), got {self.min_p:g}")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_engines: int = 1  # servers started by the run; 0 with `urls`
    # servers already running; their token comes from MEGATRON_RL_TOKEN
    urls: list[str] = field(default_factory=list)
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
        require(
            bool(self.urls) != (self.num_engines > 0) and self.num_engines >= 0,
            "num_engines: expected 1 or more and no urls, or 0 with urls of running servers, "
            f"got num_engines={self.num_engines} and {len(self.urls)} urls",
        )
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        at_least(
            0,
            max_model_len=self.max_model_len,
            num_threads=self.num_threads,
            max_retries=self.max_retries,
        )
        at_least(1, max_num_seqs=self.max_num_seqs, max_in_flight=self.max_in_flight)
        above_zero(
            kv_cache_gib=self.kv_cache_gib,
            startup_timeout_seconds=self.startup_timeout_seconds,
            request_timeout_seconds=self.request_timeout_seconds,
        )
        require(
            0 < self.gpu_memory_utilization <= 1,
            f"gpu_memory_utilization: expected in (0, 1], got {self.gpu_memory_utilization:g}",
        )
        require(
            self.port == 0 or 1024 <= self.port <= 65536 - self.num_engines,
            "port: expected 0 (free ones) or a first port from 1024 that leaves room for "
            f"{self.num_engines} below 65536, got {self.port}",
        )
        require(
            self.max_model_len == 0 or self.sampling.max_tokens < self.max_model_len,
            f"sampling.max_tokens: expected below max_model_len={self.max_model_len}, "
            f"got {self.sampling.max_tokens}",
        )
        sampling = self.sampling
        require(
            sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0,
            "sampling: expected top_p=1, top_k=0 and min_p=0, since the learner's log-probs "
            f"are over the whole vocabulary, got top_p={sampling.top_p:g}, top_k={sampling.top_k}, "
            f"min_p={sampling.min_p:g}; evaluation may truncate (eval.sampling)",
        )


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """DCMDP (arXiv 2606.08779): E[|p_train - p_inf|] <= tolerance, through a dual variable."""

    enabled: bool = True  # false: plain GRPO, the discrepancy is only measured
    initial: float = 0.1  # lambda before the first step
    # eta of lambda <- clip(lambda + eta * (mean discrepancy - tolerance), minimum, maximum)
    learning_rate: float = 1.0
    tolerance: float = 0.0037
    minimum: float = 0.0
    maximum: float = 10.0

    def __post_init__(self) -> None:
        at_least(0, learning_rate=self.learning_rate, minimum=self.minimum)
        require(
            0 <= self.tolerance <= 1,
            f"tolerance: expected a difference of probabilities in [0, 1], got {self.tolerance:g}",
        )
        require(
            self.minimum <= self.initial <= self.maximum,
            f"initial: expected from minimum={self.minimum:g} to maximum={self.maximum:g}, "
            f"got {self.initial:g}",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    clip_low: float = 0.2
    clip_high: float = 0.24
    # token_mean: over the global batch's kept tokens; sequence_mean: mean of sequences' means
    normalize: str = "token_mean"
    advantage_epsilon: float = 1e-6
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("token_mean", "sequence_mean"))
        require(0 <= self.clip_low < 1, f"clip_low: expected in [0, 1), got {self.clip_low:g}")
        at_least(0, clip_high=self.clip_high)
        above_zero(advantage_epsilon=self.advantage_epsilon)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # largest norm of the global gradient; 0: no clipping
    warmup_steps: int = 0  # optimizer updates
    decay: str = "constant"  # constant, linear, cosine (over all updates of the run)
    distributed: bool = False  # Megatron's distributed optimizer: states sharded over DP

    def __post_init__(self) -> None:
        one_of("decay", self.decay, ("constant", "linear", "cosine"))
        at_least(
            0,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_grad=self.clip_grad,
            warmup_steps=self.warmup_steps,
        )
        above_zero(epsilon=self.epsilon)
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas: expected two numbers in [0, 1), got {list(self.betas)}",
        )


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    tokens_per_micro_batch: int = 4096  # T, the budget of a packed row
    mini_batches_per_step: int = 1  # optimizer steps on one batch of rollouts
    # auto: no separate forward pass when there is one optimizer step a batch; always
    recompute: str = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        one_of("recompute", self.recompute, ("auto", "always"))
        at_least(
            1,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            mini_batches_per_step=self.mini_batches_per_step,
        )


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    bucket_mib: float = 64.0  # memory of one bucket; the peak extra memory of an update
    # of each call of an update; an engine left half-updated this long is poisoned
    timeout_seconds: float = 120.0
    probe_num_tokens: int = 48  # tokens of the parity probe after each sync; 0: no probe
    # largest mean |p_learner - p_engine| of the probe; 0: by precision (sync/probe.py)
    probe_tolerance: float = 0.0

    def __post_init__(self) -> None:
        above_zero(bucket_mib=self.bucket_mib, timeout_seconds=self.timeout_seconds)
        at_least(0, probe_num_tokens=self.probe_num_tokens, probe_tolerance=self.probe_tolerance)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0  # steps between evaluations; 0: only before and after
    num_samples: int = 8  # k of avg@k and pass@k
    at_start: bool = True
    at_end: bool = True
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7))

    def __post_init__(self) -> None:
        at_least(0, every=self.every)
        at_least(1, num_samples=self.num_samples)
        at_most(MAX_SAMPLES, num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 10  # steps; 0: only at the end
    keep: int = 2
    save_hf: bool = True  # the final weights also as a Hugging Face checkpoint

    def __post_init__(self) -> None:
        at_least(0, every=self.every)
        at_least(1, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    num_steps: int = 100
    prompts_per_step: int = 64
    samples_per_prompt: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, num_steps=self.num_steps, seed=self.seed)
        at_least(1, prompts_per_step=self.prompts_per_step)
        at_least(2, samples_per_prompt=self.samples_per_prompt)  # a group of 1 has no advantage
        at_most(MAX_SAMPLES, samples_per_prompt=self.samples_per_prompt)


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """`python -m megatron_rl.sft`: next-token training on responses to prompts."""

    num_steps: int = 200
    sequences_per_step: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    # JSONL or Parquet file of prompt and response pairs; "": prompts and answers of data.tasks
    path: str = ""
    prompt_column: str = "prompt"  # dotted paths into the records of `path`
    response_column: str = "response"
    output: str = ""  # of the Hugging Face checkpoint; "": <run_dir>/warm_start/checkpoint
    decay: str = "cosine"  # constant, linear, cosine (over warm_start.num_steps)
    log_every: int = 10  # steps between lines of metrics
    stop_loss: float = 0.0  # end once the mean loss of 20 steps is at most this; 0: never

    def __post_init__(self) -> None:
        at_least(0, num_steps=self.num_steps, warmup_steps=self.warmup_steps)
        at_least(0, learning_rate=self.learning_rate, stop_loss=self.stop_loss)
        at_least(1, sequences_per_step=self.sequences_per_step, log_every=self.log_every)
        one_of("decay", self.decay, ("constant", "linear", "cosine"))


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
