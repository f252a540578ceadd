"""A reward for being shorter than the other responses of the group.

With lengths in tokens and lambda_i = 0.5 - (len_i - min_len) / (max_len - min_len), from 0.5 for
the shortest to -0.5 for the longest of the responses that the verifier could score:

    correct response:   lambda_i
    any other:          min(0, lambda_i)

If all lengths are equal, all rewards are 0; so is the reward of a response that could not be
scored. A short response is thus rewarded only if it is
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
    rewards = [0.0] * len(group.num_tokens)
    known = {
        index: length
        for index, (length, score) in enumerate(zip(group.num_tokens, group.scores, strict=True))
        if score.failure is None
    }
    shortest, longest = min(known.values(), default=0), max(known.values(), default=0)
    if shortest == longest:
        return rewards
    for index, length in known.items():
        value = 0.5 - (length - shortest) / (longest - shortest)
        rewards[index] = value if group.scores[index].is_correct else min(0.0, value)
    return rewards
