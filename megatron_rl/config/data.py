"""Prompts and their verifiers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.rules import above_zero, at_least, one_of, require


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
class OverlongConfig:
    """What becomes of responses near rollout.sampling.max_tokens in training (DAPO, arXiv
    2503.14476); evaluation counts them as they are.
    """

    # the last tokens before max_tokens, over which a penalty grows from 0 to `penalty`; 0: none
    buffer_tokens: int = 0
    penalty: float = 1.0  # taken off the reward at max_tokens
    # nothing is learnt from a response cut at max_tokens; the discrepancy is measured on it
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        at_least(0, buffer_tokens=self.buffer_tokens, penalty=self.penalty)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    num_workers: int = 2
    timeout_seconds: float = 10.0  # for one response; longer counts as "timeout", not as wrong
    # reward of a response cut at max_tokens; null: whatever the verifier says
    truncated_reward: float | None = None
    overlong: OverlongConfig = field(default_factory=OverlongConfig)

    def __post_init__(self) -> None:
        at_least(1, num_workers=self.num_workers)
        above_zero(timeout_seconds=self.timeout_seconds)
