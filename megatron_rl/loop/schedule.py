"""Decides which steps publish weights, evaluate and save checkpoints."""

from __future__ import annotations

from megatron_rl.config import Config


def should_publish(config: Config, step: int) -> bool:
    """Every `sync.every` steps; config/ makes sure that the last step is one of them."""
    return step % config.sync.every == 0


def should_evaluate(config: Config, step: int) -> bool:
    """Every `eval.every` steps, and after the last step if `eval.at_end` is set."""
    is_due = config.eval.every > 0 and step % config.eval.every == 0
    return is_due or (config.eval.at_end and step == config.loop.num_steps)


def should_save(config: Config, step: int) -> bool:
    """Every `checkpoint.every` steps, and always after the last one."""
    is_due = config.checkpoint.every > 0 and step % config.checkpoint.every == 0
    return is_due or step == config.loop.num_steps


def should_save_hf(config: Config, step: int) -> bool:
    """Every `checkpoint.hf_every` steps; the final weights are written besides."""
    return config.checkpoint.hf_every > 0 and step % config.checkpoint.hf_every == 0
