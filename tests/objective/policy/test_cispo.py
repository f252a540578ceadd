import pytest


def test_worked_by_hand(run_loss, logs):
    # The weight is clipped to [0, 1.5], the log-prob keeps its gradient.
    old = logs(0.1, 0.4, 0.5)
    policy = old + logs(4.0, 0.25, 1.25)
    loss, grad, metrics = run_loss(
        "cispo", policy, old, [1.0, -2.0, 3.0], clip_low=1.0, clip_high=0.5
    )
    weights, advantages = (1.5, 0.25, 1.25), (1.0, -2.0, 3.0)
    assert grad == pytest.approx([-w * a for w, a in zip(weights, advantages)], rel=1e-6)
    values = [-w * a * p for w, a, p in zip(weights, advantages, policy.tolist())]
    assert loss == pytest.approx(values, rel=1e-6)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(1 / 3)
    assert metrics["loss/clip_fraction_low/mean"] == 0.0
