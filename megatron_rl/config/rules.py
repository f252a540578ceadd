"""The kinds of rules that settings keep; an error names the key, what was expected, what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config import Config


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Of two choices or more."""
    names = f"{', '.join(choices[:-1])} or {choices[-1]}"
    require(value in choices, f"{key}: expected {names}, got {value!r}")


def at_least(bound: float, /, **values: float) -> None:
    """Every value, named by its key, from `bound` up; NaN is not."""
    for key, value in values.items():
        require(value >= bound, f"{key}: expected at least {bound:g}, got {value:g}")


def at_most(bound: float, /, **values: float) -> None:
    """Every value, named by its key, up to `bound`; NaN is not."""
    for key, value in values.items():
        require(value <= bound, f"{key}: expected at most {bound:g}, got {value:g}")


def above_zero(**values: float) -> None:
    """Every value, named by its key, above 0; NaN is not."""
    for key, value in values.items():
        require(value > 0, f"{key}: expected above 0, got {value:g}")


def check_between_sections(config: Config) -> None:
    """The rules whose keys stand in different sections."""
    rollout, learner, loop = config.rollout, config.learner, config.loop
    _check_sync(config)
    buffer_tokens, max_tokens = config.reward.overlong.buffer_tokens, rollout.sampling.max_tokens
    require(
        buffer_tokens <= max_tokens,
        f"reward.overlong.buffer_tokens: expected at most rollout.sampling.max_tokens={max_tokens},"
        f" got {buffer_tokens}",
    )
    sequences = loop.prompts_per_step * loop.samples_per_prompt
    require(
        learner.mini_batches_per_step <= sequences,
        f"learner.mini_batches_per_step: expected at most the {sequences} sequences of a step "
        f"(loop), got {learner.mini_batches_per_step}",
    )
    longest = rollout.sampling.max_tokens + max(config.data.max_prompt_tokens, 1)
    require(
        longest <= learner.tokens_per_micro_batch,
        "learner.tokens_per_micro_batch: expected room for the longest prompt and response, "
        f"{longest} tokens (data.max_prompt_tokens, rollout.sampling.max_tokens), "
        f"got {learner.tokens_per_micro_batch}",
    )
    require(
        rollout.max_model_len == 0 or config.eval.sampling.max_tokens < rollout.max_model_len,
        f"eval.sampling.max_tokens: expected below rollout.max_model_len={rollout.max_model_len}, "
        f"got {config.eval.sampling.max_tokens}",
    )
    for key in ("startup_timeout_seconds", "request_timeout_seconds"):
        seconds = getattr(rollout, key)
        require(
            seconds < config.parallel.timeout_seconds,
            f"parallel.timeout_seconds: expected above rollout.{key}={seconds:g}, which other "
            f"ranks wait for in a collective, got {config.parallel.timeout_seconds:g}",
        )
    objective = config.objective
    require(
        objective.rejection.opsm_threshold is None
        or objective.old_policy == "rollout"
        or learner.mini_batches_per_step > 1,
        "objective.rejection.opsm_threshold: expected several learner.mini_batches_per_step, or "
        "objective.old_policy=rollout: with one update on recomputed log-probs the policy is the "
        f"old one and nothing is ever masked, got {objective.rejection.opsm_threshold}",
    )
    optimizer, num_updates = learner.optimizer, loop.num_steps * learner.mini_batches_per_step
    require(
        optimizer.decay == "constant" or optimizer.warmup_steps < max(num_updates, 1),
        f"learner.optimizer.warmup_steps: expected below the {num_updates} optimizer updates "
        "(loop.num_steps x learner.mini_batches_per_step) with "
        f"decay={optimizer.decay}, got {optimizer.warmup_steps}",
    )


def _check_sync(config: Config) -> None:
    """Whatever needs fresh engines, or is gone on from, falls on a step that is published."""
    every = config.sync.every
    for key, steps in (
        ("checkpoint.every", config.checkpoint.every),
        ("eval.every", config.eval.every),
        ("loop.num_steps", config.loop.num_steps),
    ):
        require(
            steps % every == 0,
            f"{key}: expected a multiple of sync.every={every}, since only then do the engines "
            f"serve the step's weights, got {steps}",
        )
