"""GSPO-token (arXiv 2507.18071): the clipped surrogate of s, the geometric mean of a sequence's
ratios r = p_theta / p_old over its kept tokens. The gradient of each token flows only through its
own probability: `s_t = sg[s] p_theta / sg[p_theta]`.
"""

from __future__ import annotations

from megatron_rl.objective.clipping import clipped_surrogate
from megatron_rl.objective.inputs import LossInputs, Surrogate
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO
from megatron_rl.objective.sequences import mean_by_sequence, to_tokens


def surrogate(inputs: LossInputs) -> Surrogate:
    """The surrogate of every token. The tokens of a sequence are clipped together, including those
    whose own ratio is 1.
    """
    policy, ids = inputs.policy_logprobs, inputs.sequence_ids
    of_sequences = mean_by_sequence(policy.detach() - inputs.old_logprobs, inputs.mask, ids)
    log_ratio = to_tokens(of_sequences, ids).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp().float() * (policy - policy.detach()).exp()
    return clipped_surrogate(ratio, log_ratio, inputs)
