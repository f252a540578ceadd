import pytest


def test_worked_by_hand(run_loss, logs):
    # Moves of +0.3, +0.3, -0.3, -0.3 and a ratio of 100 that moved by 0.099 only.
    old = logs(0.2, 0.2, 0.5, 0.5, 0.001)
    policy = logs(0.5, 0.5, 0.2, 0.2, 0.1)
    loss, grad, metrics = run_loss(
        "dppo_tv", policy, old, [1.0, -1.0, -1.0, 1.0, 1.0], clip_low=0.2, clip_high=0.2
    )
    assert loss == pytest.approx([0.0, 2.5, 0.0, -0.4, -100.0], rel=1e-5)
    assert grad == pytest.approx([0.0, 2.5, 0.0, -0.4, -100.0], rel=1e-5)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(1 / 5)
    assert metrics["loss/clip_fraction_low/mean"] == pytest.approx(1 / 5)
