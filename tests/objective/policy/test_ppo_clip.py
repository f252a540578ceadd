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
