"""What holds for every policy loss of the folder, and how one is found."""

import math

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective import policy as folder
from megatron_rl.objective.inputs import LossInputs
from megatron_rl.objective.policy import policy_loss_named, policy_losses

every_bound = pytest.mark.parametrize("bounds", [{}, {"ratio_cap": 20.0}, {"dual_clip": 3.0}])
every_loss = pytest.mark.parametrize("name", policy_losses())


def test_these_are_there():
    assert set(policy_losses()) >= {"ppo_clip", "gspo", "cispo", "dppo_tv"}


@every_loss
def test_before_the_first_step_every_gradient_is_the_policy_gradient(name, run_loss):
    old = torch.tensor([-0.3, -2.0, -9.0, -1.0])
    advantages = [1.5, -0.25, 0.0, 2.0]
    ids = torch.tensor([0, 0, 1, 1])
    loss, grad, metrics = run_loss(
        name, old, old, advantages, sequence_ids=ids, clip_low=0.2, clip_high=0.2
    )
    assert grad == [-each for each in advantages]
    if name != "cispo":  # whose value is A log p
        assert loss == [-each for each in advantages]
    assert metrics["loss/ratio/mean"] == 1.0
    assert metrics["loss/update_kl/mean"] == 0.0
    assert metrics["loss/clip_fraction_high/mean"] == metrics["loss/clip_fraction_low/mean"] == 0


@every_loss
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@every_bound
def test_masked_positions_are_exactly_zero_in_value_and_gradient(name, broken, bounds, run_loss):
    loss, grad, metrics = run_loss(
        name,
        torch.tensor([-0.5, broken, broken, -1.0]),
        torch.tensor([-0.4, broken, -1.0, broken]),
        [1.0, broken, 1.0, broken],
        mask=torch.tensor([True, False, False, False]),
        sequence_ids=torch.tensor([0, 0, 1, -1]),
        clip_low=0.2,
        clip_high=0.2,
        **bounds,
    )
    assert loss[1:] == grad[1:] == [0.0] * 3
    assert grad[0] != 0
    assert all(math.isfinite(value) for value in metrics.values())


@every_loss
@every_bound
def test_a_fully_masked_row_still_has_a_graph(name, bounds, run_loss):
    zeros, mask = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    _, grad, metrics = run_loss(
        name, zeros, zeros, [1.0] * 3, mask=mask, clip_low=0.2, clip_high=0.2, **bounds
    )
    assert grad == [0.0, 0.0, 0.0]
    assert metrics == {}


@every_loss
def test_weights_scale_value_and_gradient(name, run_loss, logs):
    old, policy = logs(0.3, 0.5), logs(0.31, 0.45)
    settings = {"clip_low": 0.2, "clip_high": 0.2}
    loss, grad, _ = run_loss(name, policy, old, [1.0, -1.0], **settings)
    weights = torch.tensor([2.0, 0.0])
    weighted, weighted_grad, _ = run_loss(
        name, policy, old, [1.0, -1.0], weights=weights, **settings
    )
    assert weighted == [2.0 * loss[0], 0.0]
    assert weighted_grad == [2.0 * grad[0], 0.0]


def test_a_name_without_a_file_is_refused():
    with pytest.raises(ConfigError, match=r"objective\.policy_loss: .*cispo.*, got 'ppo'"):
        policy_loss_named("ppo")


REINFORCE = """
import torch
from megatron_rl.objective.inputs import Surrogate

def surrogate(inputs):
    nothing = torch.zeros_like(inputs.mask)
    ratio = torch.ones(len(nothing), dtype=torch.float64)
    values = inputs.advantages * inputs.policy_logprobs
    return Surrogate(
        values=values,
        ratio=ratio,
        is_clipped_low=nothing,
        is_clipped_high=nothing,
        is_capped=nothing,
        is_dual_clipped=nothing,
    )
"""


def test_a_new_loss_is_one_file(tmp_path, monkeypatch, run_loss, logs):
    """Found by its name; what starts with an underscore is none, and nor is a file without one."""
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    before = policy_losses()
    (tmp_path / "reinforce_for_a_test.py").write_text(REINFORCE)
    (tmp_path / "_pieces.py").write_text("")
    (tmp_path / "empty_for_a_test.py").write_text("")
    assert set(policy_losses()) - set(before) == {"reinforce_for_a_test", "empty_for_a_test"}
    policy = logs(0.5, 0.25)
    loss, grad, metrics = run_loss(
        "reinforce_for_a_test", policy, logs(0.1, 0.1), [2.0, -1.0], clip_low=0.2, clip_high=0.2
    )
    assert grad == [-2.0, 1.0]
    assert loss == pytest.approx([2.0 * math.log(2), -2.0 * math.log(2)])
    assert metrics["loss/ratio/mean"] == 1.0
    with pytest.raises(
        ConfigError, match=r"expected a function surrogate\(inputs\) in .*empty_for"
    ):
        policy_loss_named("empty_for_a_test")


def test_only_the_loss_that_is_asked_for_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    (tmp_path / "broken_for_a_test.py").write_text("raise RuntimeError('imported')")
    assert "broken_for_a_test" in policy_losses()
    zeros = torch.zeros(1)
    inputs = LossInputs.of(
        policy_logprobs=zeros,
        old_logprobs=zeros,
        advantages=zeros + 3.0,
        mask=zeros == 0,
        sequence_ids=zeros.long(),
        clip_low=0.2,
        clip_high=0.2,
        ratio_cap=0.0,
        dual_clip=0.0,
    )
    assert policy_loss_named("ppo_clip")(inputs).values.tolist() == [3.0]
    with pytest.raises(RuntimeError, match="imported"):
        policy_loss_named("broken_for_a_test")
