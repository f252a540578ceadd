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


def test_the_truncated_ratio_worked_by_hand(run_loss, logs):
    # A ratio of 100 within the trust region has the weight 20; one of 30 outside it has none, and
    # one of 10 is not truncated.
    old, policy = logs(0.001, 0.01, 0.01), logs(0.1, 0.3, 0.1)
    settings = {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 20.0}
    loss, grad, metrics = run_loss("dppo_tv", policy, old, [-2.0, 1.0, 1.0], **settings)
    assert loss == pytest.approx([40.0, 0.0, -10.0], rel=1e-5)
    assert grad == pytest.approx([40.0, 0.0, -10.0], rel=1e-5)
    assert metrics["loss/clip_fraction_cap/mean"] == pytest.approx(1 / 3)
    assert metrics["loss/ratio/max"] == pytest.approx(100.0, rel=1e-5)
