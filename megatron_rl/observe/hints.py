"""What a user should look at who sees figures that do not move, in one line.

Of training, each sign is told once, after it was there in each of `NUM_STEPS` steps in a row:

    truncated     every response was cut at max_tokens
    unformatted   no group had a signal, and no response held an answer that its verifier can read
    no signal     no group had a signal: the task's reward moves no weight

The more specific sign stands first, and a later one is not told as long as an earlier one is there.
Of an evaluation, a set is told each time that all of its responses failed alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.observe.evaluations import HELD_OUT_LABEL, figures_of_sets

NUM_STEPS = 5
SIGNAL = "reward/groups_with_signal/mean"
_TRUNCATED, _UNFORMATTED, _NO_SIGNAL = SIGNS = ("truncated", "unformatted", "no signal")


class Hints:
    """Finds the signs in the metrics of one step after another.

    Args:
        records: the metrics of the steps that a resumed run has taken, whose hints were told.
    """

    def __init__(
        self, config: Config, run_dir: Path, records: Iterable[Mapping[str, float | None]] = ()
    ) -> None:
        self._config, self._run_dir = config, run_dir
        self._num_steps = dict.fromkeys(SIGNS, 0)  # in a row
        self._num_groups = dict.fromkeys(SIGNS, 0)  # of these steps
        self._is_told: set[str] = set()
        for record in records:
            self.add(record)

    def add(self, metrics: Mapping[str, float | None]) -> str | None:
        """The line for the console after a step; None if there is nothing to tell.

        Args:
            metrics: of the step, reduced. A line without rollouts, as an evaluation before the
                first step has, is no step.
        """
        if metrics.get(SIGNAL) is None:
            return None
        signs = signs_of(metrics, self._config)
        for sign in SIGNS:
            is_there = sign in signs
            num_groups = round(metrics.get("rollout/num_prompts") or 0)
            self._num_steps[sign] = self._num_steps[sign] + 1 if is_there else 0
            self._num_groups[sign] = self._num_groups[sign] + num_groups if is_there else 0
        lasting = next((sign for sign in SIGNS if self._num_steps[sign] >= NUM_STEPS), None)
        if lasting is None or lasting in self._is_told:
            return None
        self._is_told.add(lasting)
        return self._line(lasting, metrics)

    def _line(self, sign: str, metrics: Mapping[str, float | None]) -> str:
        steps = f"the last {self._num_steps[sign]} steps"
        of_steps = f"{steps} ({self._num_groups[sign]} prompts)"
        look = f"samples: {_inspect(self._run_dir)}"
        sampling = self._config.rollout.sampling
        if sign == _TRUNCATED:
            return (
                f"hint: every response of {of_steps} was cut at rollout.sampling.max_tokens="
                f"{sampling.max_tokens}, none ended by itself; {_LENGTH_CAUSES}; {look}"
            )
        reward, formatted = metrics.get("reward/mean"), metrics.get("reward/format_rate/mean")
        if sign == _UNFORMATTED:
            return (
                f"hint: the verifiers found an answer in no response of {of_steps}, and mean "
                f"reward {_shown(reward)} teaches nothing{_alone(metrics)}; {_FORM_CAUSES}; {look}"
            )
        return (
            f"hint: 0 of {self._num_groups[sign]} groups of {steps} had a signal, all responses to "
            f"a prompt earned the same (mean reward {_shown(reward)}, {_shown(formatted)} of the "
            f"responses with an answer): at no learning rate does the reward change a weight"
            f"{_alone(metrics)}; {_easier_or_harder(reward)}, a verifier or expected answers that "
            "do not tell right from wrong (data.tasks[].verifier, answer_column), a prompt that "
            "does not ask for the form that the verifier reads (data.tasks[].template), or too few "
            "samples of a prompt "
            f"(loop.samples_per_prompt={self._config.loop.samples_per_prompt}); {look}"
        )


_LENGTH_CAUSES = (
    "likely causes: max_tokens is too small, the model is not used to its chat template "
    "(data.chat_template), or the token that it ends with is not named by eos_token_id of "
    "config.json or generation_config.json (rollout.sampling.stop and stop_token_ids end a "
    "response too)"
)
_FORM_CAUSES = (
    "the prompt must ask for the form that the verifier reads (data.tasks[].template, "
    "data.system_prompt; docs/answers.md), or another verifier reads the form that the model "
    "writes (data.tasks[].verifier)"
)


def signs_of(metrics: Mapping[str, float | None], config: Config) -> set[str]:
    """Those of SIGNS that the metrics of one step show."""
    signs: set[str] = set()
    if metrics.get("rollout/truncation_rate/mean") == 1:
        signs.add(_TRUNCATED)
    # The rewards of a group verifier are no signal of the verifiers, and teach all the same.
    teaches = bool(config.reward.group_verifier) and bool(metrics.get("advantage/abs/mean"))
    if metrics.get(SIGNAL) == 0 and not teaches:
        signs.add(_NO_SIGNAL)
        if metrics.get("reward/format_rate/mean") == 0:
            signs.add(_UNFORMATTED)
    return signs


def evaluation_hints(metrics: Mapping[str, float | None], run_dir: Path) -> list[str]:
    """A line for each evaluation set whose responses all failed alike: at their verifier, at
    max_tokens, or at the form of the answer.

    Args:
        run_dir: of the run, or of an evaluation without a run.
    """
    lines = []
    for name, figures in figures_of_sets(metrics).items():
        key = f"eval {name}" if name else HELD_OUT_LABEL
        samples = f"samples: {_inspect(run_dir)} --evaluation {name}".rstrip()
        if figures.get("failure_rate/mean") == 1:
            lines.append(
                f"hint: {key}: its verifier could score none of the responses (it crashed or ran "
                "out of time, see the warnings above; reward.timeout_seconds, "
                f"reward.memory_gib); {samples}"
            )
        elif figures.get("truncation_rate/mean") == 1:
            limit = "eval.sets[].sampling.max_tokens" if name else "eval.sampling.max_tokens"
            lines.append(
                f"hint: {key}: every response was cut at max_tokens ({limit}), none ended by "
                f"itself; {samples}"
            )
        elif figures.get("format_rate/mean") == 0:
            which = "eval.sets[]" if name else "data.tasks[]"
            lines.append(
                f"hint: {key}: the verifier found an answer in none of the responses; the prompt "
                f"must ask for the form that it reads ({which}.template, system_prompt; "
                f"docs/answers.md), or another one reads the model's ({which}.verifier); {samples}"
            )
    return lines


def _inspect(run_dir: Path) -> str:
    return f"python tools/inspect_rollouts.py {run_dir}"


def _alone(metrics: Mapping[str, float | None]) -> str:
    """What the constraint does meanwhile, if its lambda is not 0."""
    value = metrics.get("constraint/lambda")
    if not value:
        return ""
    return (
        f", and the constraint, with a lambda of {value:.3g}, acts without one, which can "
        "destroy the policy (docs/no-reward-study.md; objective.preset=dc_grpo_age_penalty or "
        "loop.dynamic_sampling.enabled=true)"
    )


def _easier_or_harder(reward: float | None) -> str:
    if reward is None or reward <= 0:
        return "likely causes: prompts that are too hard for the model"
    return "likely causes: prompts that are too easy for the model"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
