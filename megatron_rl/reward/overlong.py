"""Computes the penalty for a long response from its length. With start = max_tokens -
buffer_tokens it is

    0                                                  up to start
    -penalty * (length - start) / buffer_tokens        above start, reaching -penalty at max_tokens

Source: the soft over-long punishment of DAPO (arXiv 2503.14476, equation 13), with verl's factor.
"""

from __future__ import annotations


def overlong_penalty(
    num_tokens: int, *, max_tokens: int, buffer_tokens: int, penalty: float
) -> float:
    """The value that is added to the reward of a response.

    Args:
        num_tokens: length of the response, at most max_tokens.
        max_tokens: length at which responses are cut.
        buffer_tokens: the last tokens below max_tokens, over which the penalty grows; 0: none.
        penalty: size of the penalty at max_tokens, in units of the reward, at least 0.

    Returns:
        From -penalty to 0.
    """
    excess = num_tokens - (max_tokens - buffer_tokens)
    if buffer_tokens == 0 or excess <= 0:
        return 0.0
    return -penalty * excess / buffer_tokens
