"""PPO's clipped surrogate, `min(r A, clip(r) A)` with r = p_theta / p_old and clip(r) = clip(r, 1 -
clip_low, 1 + clip_high). It is used by PPO (arXiv 1707.06347), by GRPO (arXiv 2402.03300), and,
with a separate upper bound, by DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from megatron_rl.objective.clipping import clipped_surrogate
from megatron_rl.objective.inputs import LossInputs, Surrogate
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO


def surrogate(inputs: LossInputs) -> Surrogate:
    """The surrogate of every token. Its gradient is that of r A, and 0 where a bound acts."""
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clipped_surrogate(log_ratio.exp(), log_ratio.detach(), inputs)
