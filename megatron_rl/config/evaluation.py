"""Settings of evaluation: when, on which sets of questions, and how their responses are sampled."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from megatron_rl.config.data import QuestionsConfig
from megatron_rl.config.rollout import SamplingConfig
from megatron_rl.config.rules import MAX_PROMPTS, at_least, at_most, join_choices, require
from megatron_rl.records import MAX_SAMPLES

FIXED_STEP = 1  # the step of eval.fixed_rollouts that is scored
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # part of a metric's key and of a folder's name


def _default_sampling() -> SamplingConfig:
    return SamplingConfig(temperature=0.7)


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig(QuestionsConfig):
    """A named set of questions that a run evaluates on, besides the held-out prompts. `name` names
    it in metrics (eval/<name>/...); it is also the reasoning-gym task, unless `task` or `path` is
    given.
    """

    task: str = ""  # a reasoning-gym task
    origin: str = ""  # where the files can be had; said if they are missing
    # questions: rows of the files, drawn with data.held_out_seed (0: all), or draws of the task
    num_rows: int = 0
    num_samples: int = 0  # responses to each question, the k of avg@k; 0: eval.num_samples
    pass_at: list[int] = field(default_factory=list)  # the k of pass@k; []: num_samples
    # keys that are not given are those of eval.sampling
    sampling: SamplingConfig = field(default_factory=_default_sampling)

    @property
    def source(self) -> str:
        """Identifies the set in prompts and recordings, apart from the training tasks."""
        return f"eval/{self.name}"

    @property
    def generator(self) -> str:
        """The reasoning-gym task, if no `path` is given."""
        return self.task or self.name

    @property
    def generator_key(self) -> str:
        """The key that names the reasoning-gym task."""
        return "task" if self.task else "name"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(_NAME.fullmatch(self.name)),
            f"name: expected letters, digits, '_', '.' and '-', got {self.name!r}",
        )
        require(
            not (self.task and self.path),
            f"task: expected a task or a path, got {self.task!r} and {self.path!r}",
        )
        at_least(0, num_rows=self.num_rows, num_samples=self.num_samples)
        at_most(MAX_SAMPLES, num_samples=self.num_samples)
        at_most(MAX_PROMPTS, num_rows=self.num_rows)
        require(
            bool(self.path) or self.num_rows > 0,
            f"num_rows: expected the number of questions of the task {self.generator}, got 0",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how the run evaluates on the held-out prompts and on its sets."""

    every: int = 0  # steps between evaluations; 0: only before the first and after the last step
    num_samples: int = 8  # k of avg@k and pass@k
    at_start: bool = True
    at_end: bool = True
    # named sets of questions, evaluated besides the data.num_held_out prompts
    sets: list[EvalSetConfig] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)  # names of sets that are left out
    # a run's rollouts/ folder: learner and engine score the sequences of its step 1 at every
    # evaluation; "": none
    fixed_rollouts: str = ""
    num_fixed_rollouts: int = 256  # sequences of that step, at most
    sampling: SamplingConfig = field(default_factory=_default_sampling)

    def __post_init__(self) -> None:
        at_least(0, every=self.every)
        at_least(1, num_samples=self.num_samples, num_fixed_rollouts=self.num_fixed_rollouts)
        at_most(MAX_SAMPLES, num_samples=self.num_samples)
        # Folders of sets must differ on file systems that ignore case, too.
        counts = Counter(each.name.lower() for each in self.sets)
        for each in self.sets:
            require(
                counts[each.name.lower()] == 1,
                f"sets: expected sets of different names, got {each.name} twice",
            )
        names = [each.name for each in self.sets]
        for name in self.skip:
            expected = join_choices(names) if names else "none, since there are no sets"
            require(name in names, f"skip: expected {expected}, got {name!r}")
        for key, each in self.used_sets().items():
            for k in each.pass_at:
                require(
                    1 <= k <= each.num_samples,
                    f"{key}.pass_at: expected 1 to num_samples={each.num_samples}, got {k}",
                )

    def used_sets(self) -> dict[str, EvalSetConfig]:
        """The sets that are not skipped, by their keys, such as `sets[0]`, with their numbers of
        samples and the k of pass@k.
        """
        used = {}
        for index, each in enumerate(self.sets):
            if each.name in self.skip:
                continue
            num_samples = each.num_samples or self.num_samples
            pass_at = sorted({*each.pass_at}) or [num_samples]
            used[f"sets[{index}]"] = replace(each, num_samples=num_samples, pass_at=pass_at)
        return used
