"""The soft over-long punishment, by hand."""

from __future__ import annotations

import pytest

from megatron_rl.reward.overlong import overlong_penalty


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (12, 0.0), (15, 0.0), (16, -0.1), (18, -0.3), (20, -0.5)],
)
def test_the_penalty_grows_over_the_buffer(num_tokens: int, expected: float) -> None:
    found = overlong_penalty(num_tokens, max_tokens=20, buffer_tokens=5, penalty=0.5)
    assert found == pytest.approx(expected, abs=1e-15)


def test_no_buffer_or_no_penalty_takes_nothing_off() -> None:
    assert overlong_penalty(20, max_tokens=20, buffer_tokens=0, penalty=1.0) == 0.0
    assert overlong_penalty(20, max_tokens=20, buffer_tokens=5, penalty=0.0) == 0.0


def test_the_published_setting() -> None:
    """DAPO: a penalty of 1 over the last 4,096 of 20,480 tokens."""
    for num_tokens, expected in ((16384, 0.0), (18432, -0.5), (20480, -1.0)):
        found = overlong_penalty(num_tokens, max_tokens=20480, buffer_tokens=4096, penalty=1.0)
        assert found == expected
