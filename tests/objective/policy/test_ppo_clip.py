import math

import pytest
import torch


def test_worked_by_hand(run_loss, logs):
    # Bounds 0.75 and 1.5. A clip acts where it lowers the surrogate: high ratio with a positive
    # advantage, low ratio with a negative one; the other two corners stay unclipped.
    policy = logs(2.0, 2.0, 0.5, 0.5, 1.25)
    loss, grad, metrics = run_loss(
        "ppo_clip",
        policy,
        torch.zeros(5),
        [2.0, -2.0, 2.0, -2.0, 4.0],
        clip_low=0.25,
        clip_high=0.5,
    )
    assert loss == pytest.approx([-3.0, 4.0, -1.0, 1.5, -5.0], rel=1e-6)
    # Unclipped: d(-r A)/d logprob = -r A; clipped: 0.
    assert grad == pytest.approx([0.0, 4.0, -1.0, 0.0, -5.0], rel=1e-6)
    assert metrics["loss/clip_fraction_high/mean"] == pytest.approx(1 / 5)
    assert metrics["loss/clip_fraction_low/mean"] == pytest.approx(1 / 5)
    assert metrics["loss/ratio/mean"] == pytest.approx(6.25 / 5, rel=1e-6)
    assert metrics["loss/ratio/max"] == pytest.approx(2.0, rel=1e-6)
    assert metrics["loss/shaped_advantage/mean"] == pytest.approx(4 / 5)
    kl = (2 * (1 - math.log(2)) + 2 * (-0.5 + math.log(2)) + 0.25 - math.log(1.25)) / 5
    assert metrics["loss/update_kl/mean"] == pytest.approx(kl, rel=1e-5)


def test_log_ratios_are_clamped(run_loss):
    policy, old = torch.tensor([0.0, -900.0]), torch.tensor([-900.0, 0.0])
    loss, grad, _ = run_loss("ppo_clip", policy, old, [-1.0, 1.0], clip_low=0.2, clip_high=0.2)
    assert loss == pytest.approx([math.exp(20), -math.exp(-20)], rel=1e-6)
    assert grad == [0.0, 0.0]


def test_dual_clip_worked_by_hand(run_loss, logs):
    # c = 3: for A < 0 the surrogate is at least 3 A. Ratios 4, 2 and 1/2 with A = -2, whose
    # minimum is -8, -4 and -1.5 (the lower clip at 0.75); a ratio of 4 with A = 2 is clipped to
    # 1.5.
    settings = {"clip_low": 0.25, "clip_high": 0.5, "dual_clip": 3.0}
    policy, advantages = logs(4.0, 2.0, 0.5, 4.0), [-2.0, -2.0, -2.0, 2.0]
    loss, grad, metrics = run_loss("ppo_clip", policy, torch.zeros(4), advantages, **settings)
    assert loss == pytest.approx([6.0, 4.0, 1.5, -3.0], rel=1e-6)
    assert grad == pytest.approx([0.0, 4.0, 0.0, 0.0], rel=1e-6)
    assert metrics["loss/clip_fraction_dual/mean"] == pytest.approx(1 / 4)
    assert "loss/clip_fraction_cap/mean" not in metrics
    assert metrics["loss/ratio/max"] == pytest.approx(4.0)


def test_cap_on_the_ratio_worked_by_hand(run_loss, logs):
    # Capped at 3, the weight of a ratio of 4 is 3, and so is its gradient; 2 is left as it is. A
    # log-ratio beyond the clamp of 20 keeps the gradient too.
    settings = {"clip_low": 0.25, "clip_high": 0.5, "ratio_cap": 3.0}
    policy = torch.cat([logs(4.0, 2.0, 4.0), torch.tensor([30.0])])
    old, advantages = torch.zeros(4), [-2.0, -2.0, 2.0, -1.0]
    loss, grad, metrics = run_loss("ppo_clip", policy, old, advantages, **settings)
    assert loss == pytest.approx([6.0, 4.0, -3.0, 3.0], rel=1e-6)
    assert grad == pytest.approx([6.0, 4.0, 0.0, 3.0], rel=1e-6)
    assert metrics["loss/clip_fraction_cap/mean"] == pytest.approx(2 / 4)
    assert "loss/clip_fraction_dual/mean" not in metrics
