"""[imports megatron] Megatron's optimizer and learning-rate schedule for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rl.config.learner import OptimizerConfig
from megatron_rl.learner.model.adam import use_adam
from megatron_rl.learner.model.implementations import adam_of
from megatron_rl.learner.model.optimizer_parts import chained_optimizers

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_optimizer(
    config: OptimizerConfig, parts: Sequence[DistributedDataParallel], *, num_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW under Megatron's control (float32 main weights and moments), and its schedule.

    Args:
        parts: this rank's parts of the model.
        num_updates: optimizer steps of the whole run; a decaying schedule reaches 0 after them.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    use_adam(adam_of(config.implementation))
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.epsilon,
            clip_grad=config.clip_grad,
            bf16=parts[0].config.bf16,
            params_dtype=parts[0].config.params_dtype,
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=config.overlap_param_gather,
        ),
        list(parts),
    )
    # Before the first step there would be no moments, and then a checkpoint could not be written or
    # read. A step can be missing: no optimizer step is taken for a batch without a kept token.
    for part in chained_optimizers(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=0.0,
        lr_warmup_steps=config.warmup_steps,
        # The rate reaches 0 one step after the last one, not at it. Megatron requires more decay
        # steps than warm-up steps, even with a constant rate.
        lr_decay_steps=max(num_updates, config.warmup_steps) + 1,
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The schedule follows this run's config; only the position in it is read from a checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
