"""A reward for being shorter than the other responses of the group.

With lengths in tokens and lambda_i = 0.5 - (len_i - min_len) / (max_len - min_len), from 0.5 for
the shortest response to -0.5 for the longest:

    correct response:   lambda_i
    any other:          min(0, lambda_i)

If all lengths are equal, all rewards are 0. A short response is thus rewarded only if it is
correct, and a long one is always penalised. Source: Kimi k1.5 (arXiv 2501.12599, section 2.3.3).
"""

from __future__ import annotations

from megatron_rl.reward.protocols import GroupInputs


def group_rewards(group: GroupInputs) -> list[float]:
    """The length reward of each response.

    Args:
        group: the group; a response is correct if its `Score.is_correct` is True.

    Returns:
        [G] numbers from -0.5 to 0.5.
    """
    shortest, longest = min(group.num_tokens), max(group.num_tokens)
    if shortest == longest:
        return [0.0] * len(group.num_tokens)
    lambdas = [0.5 - (length - shortest) / (longest - shortest) for length in group.num_tokens]
    return [
        value if score.is_correct else min(0.0, value)
        for value, score in zip(lambdas, group.scores, strict=True)
    ]
