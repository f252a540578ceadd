"""Settings of the learner: its batches, its optimizer, and the supervised warm start before RL."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.choices import AdamImplementation, Decay, Recompute, RoutingReplay
from megatron_rl.config.rules import above_zero, at_least, literal_choices, require


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # largest norm of the global gradient; 0: no clipping
    warmup_steps: int = 0  # optimizer updates
    decay: Decay = "constant"  # over all updates of the run
    distributed: bool = False  # Megatron's distributed optimizer: states sharded over DP
    # add gradients over replicas during the backward pass, a bucket at a time
    overlap_grad_reduce: bool = False
    # gather the updated weights during the next forward pass; with `distributed` alone
    overlap_param_gather: bool = False
    # auto: Transformer Engine's on a GPU where it is installed, otherwise Apex's, otherwise torch's
    implementation: AdamImplementation = "auto"

    def __post_init__(self) -> None:
        literal_choices(self)
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
        require(
            not self.overlap_param_gather or (self.distributed and self.overlap_grad_reduce),
            "overlap_param_gather: expected distributed=true and overlap_grad_reduce=true with it, "
            f"got distributed={self.distributed}, overlap_grad_reduce={self.overlap_grad_reduce}",
        )


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The routers of a mixture of experts; no effect on a dense model."""

    # Losses that are added to the objective, for each layer (learner/model/routing.py); 0: off.
    # Qwen3 was trained with a load_balancing_coefficient of 0.001
    load_balancing_coefficient: float = 0.0  # times the mean over sequences, 1 if balanced
    z_loss_coefficient: float = 0.0  # times the mean over tokens of the squared log-sum-exp
    # which experts a token is sent to in the update. none: those that the router chooses then;
    # recomputed: those that it chose in the separate pass before the update; rollout: those that it
    # was sent to in the engine, which has to return them. Their weights are always computed anew
    routing_replay: RoutingReplay = "none"

    def __post_init__(self) -> None:
        literal_choices(self)
        at_least(
            0,
            load_balancing_coefficient=self.load_balancing_coefficient,
            z_loss_coefficient=self.z_loss_coefficient,
        )

    @property
    def has_loss(self) -> bool:
        """Whether a loss is added to the objective."""
        return self.load_balancing_coefficient > 0 or self.z_loss_coefficient > 0


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch of rollouts is turned into optimizer updates."""

    tokens_per_micro_batch: int = 4096  # T, the number of tokens of a packed row
    mini_batches_per_step: int = 1  # optimizer updates on one batch of rollouts
    # the separate forward pass that recomputes log-probs before the update. auto: skipped if a
    # batch has one update, because the update's forward pass gives the same numbers; always: never
    # skipped
    recompute: Recompute = "auto"
    # steps in a row in which an update was left out because a number in it was not finite; one more
    # ends the run. 0: the first one does
    max_broken_steps: int = 3
    # TFLOP/s of one GPU in the learner's precision, for speed/mfu; 0: by the GPU's name
    peak_tflops: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)

    def __post_init__(self) -> None:
        literal_choices(self)
        at_least(
            1,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            mini_batches_per_step=self.mini_batches_per_step,
        )
        at_least(0, peak_tflops=self.peak_tflops, max_broken_steps=self.max_broken_steps)


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """`python -m megatron_rl.sft`: next-token training on responses to prompts."""

    num_steps: int = 200
    sequences_per_step: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    # files of prompt and response pairs, named as in data.tasks[].path; "": prompts and answers of
    # data.tasks
    path: str | list[str] = ""
    prompt_column: str = "prompt"  # dotted path into the records of `path`
    response_column: str = "response"  # dotted path into the records of `path`
    output: str = ""  # folder of the Hugging Face checkpoint; "": <run_dir>/warm_start/checkpoint
    decay: Decay = "cosine"  # over warm_start.num_steps
    log_every: int = 10  # steps between two lines of metrics
    stop_loss: float = 0.0  # stop when the mean loss of 20 steps is at most this; 0: never

    def __post_init__(self) -> None:
        literal_choices(self)
        at_least(0, num_steps=self.num_steps, warmup_steps=self.warmup_steps)
        at_least(0, learning_rate=self.learning_rate, stop_loss=self.stop_loss)
        at_least(1, sequences_per_step=self.sequences_per_step, log_every=self.log_every)
