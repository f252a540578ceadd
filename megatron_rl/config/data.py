"""Settings of the prompts, and of the rewards of their responses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.choices import (
    GROUP_VERIFIERS,
    VERIFIERS,
    ChatTemplate,
    OverlongPrompts,
    Repeats,
    UnreadableAnswers,
)
from megatron_rl.config.rules import (
    MAX_PROMPTS,
    above_zero,
    at_least,
    at_most,
    is_import_path,
    join_choices,
    literal_choices,
    require,
)

_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One of several verifiers of a task, and its weight in the reward."""

    verifier: str = "auto"  # as data.tasks[].verifier
    weight: float = 1.0  # below 0: a penalty

    def __post_init__(self) -> None:
        _check_verifier("verifier", self.verifier, ("auto", *VERIFIERS))
        require(math.isfinite(self.weight), f"weight: expected a finite number, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Questions from a reasoning-gym task or from files, and how their answers are scored: what a
    task of the training data and a set of the evaluation have in common.
    """

    name: str = ""  # a reasoning-gym task; or any label when `path` is given
    # a file (JSONL, JSON, Parquet, CSV, Arrow), a pattern such as data/train-*.parquet, a folder of
    # such files or one that Hugging Face's save_to_disk wrote, or a list of these
    path: str | list[str] = ""
    options: dict = field(default_factory=dict)  # the reasoning-gym task's own settings
    prompt_column: str = "question"  # a dotted path into the record, e.g. "metadata.expression"
    answer_column: str = "answer"  # e.g. "reward_model.ground_truth" (DAPO-Math-17k)
    template: str = "{prompt}"  # text around the prompt, before any chat template
    system_prompt: str | None = None  # null: data.system_prompt; "": none
    # auto: the task's own scorer for a reasoning-gym task, math_verify for a file; or a module of
    # reward/verifiers/, or an import path "package.module:function"
    verifier: str = "auto"
    # several verifiers in place of `verifier`; the reward is the sum of weight x reward, and the
    # first one decides whether a response is correct, and whether it is formatted
    rewards: list[RewardTerm] = field(default_factory=list)

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """The verifiers of the task with their weights, the one that decides first."""
        return tuple(self.rewards) or (RewardTerm(verifier=self.verifier),)

    @property
    def source(self) -> str:
        """Identifies the task in prompts, metrics and messages: its name, or the file's stem."""
        return self.name or (Path(self.path).stem if isinstance(self.path, str) else "")

    @property
    def generator(self) -> str:
        """The reasoning-gym task, if no `path` is given."""
        return self.name

    @property
    def generator_key(self) -> str:
        """The key that names the reasoning-gym task."""
        return "name"

    def __post_init__(self) -> None:
        require(
            bool(self.name or self.path),
            "name: expected a reasoning-gym task, or a label with path, got neither",
        )
        is_one_name = isinstance(self.path, str) and not _PATTERN.search(self.path)
        require(
            bool(self.name) or is_one_name,
            f"name: expected a label for the files of path={self.path!r}, got none",
        )
        require(
            "{prompt}" in self.template,
            f"template: expected a text with {{prompt}} in it, got {self.template!r}",
        )
        _check_verifier("verifier", self.verifier, ("auto", *VERIFIERS))
        require(
            not self.rewards or self.verifier == "auto",
            f"rewards: expected no verifier beside it, got verifier={self.verifier}",
        )
        names = [term.verifier for term in self.rewards]
        require(
            len(set(names)) == len(names),
            f"rewards: expected every verifier once, got {', '.join(names)}",
        )
        require(
            self.terms[0].weight > 0,
            "rewards[0].weight: expected above 0, since the first verifier says what is correct, "
            f"got {self.terms[0].weight}",
        )


@dataclass(frozen=True, kw_only=True)
class TaskConfig(QuestionsConfig):
    """One source of training prompts."""

    weight: float = 1.0  # share in the mixture, relative to the other tasks

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prompts of a run, and those that are held out for evaluation."""

    tasks: list[TaskConfig] = field(default_factory=list)
    seed: int = 0
    # seed of the held-out prompts, whose texts never appear in training
    held_out_seed: int = 1_000_003
    num_held_out: int = 200
    # rows of one task with the same prompt and the same answer as an earlier row
    repeats: Repeats = "drop"
    # rows whose answer a verifier of the task cannot read; what is dropped is counted
    unreadable_answers: UnreadableAnswers = "error"
    max_prompt_tokens: int = 0  # 0: the model's context less rollout.sampling.max_tokens
    overlong: OverlongPrompts = "error"  # prompts of more tokens; what is dropped is counted
    # the first message of every prompt, in place of a system message of the row; "": none
    system_prompt: str = ""
    # auto: use the tokenizer's chat template if it has one; never; always
    chat_template: ChatTemplate = "auto"
    chat_template_file: str = ""  # a Jinja file to use instead of the tokenizer's template
    # variables of the chat template, e.g. {enable_thinking: false}
    chat_template_arguments: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        literal_choices(self)
        at_least(
            0,
            seed=self.seed,
            held_out_seed=self.held_out_seed,
            num_held_out=self.num_held_out,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        at_most(MAX_PROMPTS, num_held_out=self.num_held_out)
        require(
            self.held_out_seed != self.seed,
            f"held_out_seed: expected another seed than data.seed, got {self.held_out_seed}",
        )
        for key in ("chat_template_file", "chat_template_arguments"):
            value = getattr(self, key)
            require(
                not value or self.chat_template != "never",
                f"{key}: expected none with chat_template=never, got {value!r}",
            )


@dataclass(frozen=True, kw_only=True)
class OverlongConfig:
    """How training treats responses near rollout.sampling.max_tokens (DAPO, arXiv 2503.14476).
    Evaluation scores such responses without a penalty.
    """

    # the last tokens before max_tokens, over which a penalty grows from 0 to `penalty`; 0: none
    buffer_tokens: int = 0
    penalty: float = 1.0  # subtracted from the reward at max_tokens
    # leave responses that were cut at max_tokens out of the loss; their discrepancy is measured
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        at_least(0, buffer_tokens=self.buffer_tokens, penalty=self.penalty)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How responses are scored."""

    num_workers: int = 2  # scoring processes
    # for one response, or for one group; a longer one counts as "timeout", not as wrong
    timeout_seconds: float = 10.0
    # GiB of memory of a scoring process, at most 4 for built-in verifiers; more counts as "crash".
    # 0: no limit for a function of your own
    memory_gib: float = 16.0
    # reward of a response that was cut at max_tokens; null: the verifier's score
    truncated_reward: float | None = None
    # keep reasoning that did not end from the verifiers: the text behind a `<think>`, opened by the
    # response or by the end of the prompt, that has no `</think>`
    skip_unfinished_reasoning: bool = True
    # a verifier whose values are added to the rewards of a group in training: a module of
    # reward/group_verifiers/, or an import path "package.module:function"; "": none
    group_verifier: str = ""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)

    def __post_init__(self) -> None:
        at_least(1, num_workers=self.num_workers)
        above_zero(timeout_seconds=self.timeout_seconds)
        at_least(0, memory_gib=self.memory_gib)
        if self.group_verifier:
            _check_verifier("group_verifier", self.group_verifier, GROUP_VERIFIERS)


def _check_verifier(key: str, name: str, choices: tuple[str, ...]) -> None:
    expected = join_choices((*choices, '"package.module:function"'))
    require(name in choices or is_import_path(name), f"{key}: expected {expected}, got {name!r}")
