"""Weights, masking and metrics around a surrogate; the surrogates are tested in policy/."""

from typing import Any

import pytest
import torch

from megatron_rl.objective.inputs import LossInputs, Surrogate
from megatron_rl.objective.policy_loss import policy_loss
from megatron_rl.observe.metrics import reduce


def doubled(inputs: LossInputs) -> Surrogate:
    """Twice the advantage, whatever the policy; as if every second token were clipped."""
    is_odd = torch.arange(len(inputs.mask)) % 2 == 1
    return Surrogate(
        values=2.0 * inputs.advantages + 0.0 * inputs.policy_logprobs,
        ratio=torch.arange(len(inputs.mask)).double(),
        is_clipped_low=is_odd,
        is_clipped_high=~is_odd,
        is_capped=is_odd,
        is_dual_clipped=~is_odd,
    )


def inputs_of(mask: list[bool], **changed: Any) -> LossInputs:
    zeros = torch.zeros(len(mask))
    given = {"policy_logprobs": zeros, "old_logprobs": zeros, "advantages": zeros}
    ids = torch.zeros(len(mask), dtype=torch.int64)
    given |= {"mask": torch.tensor(mask), "sequence_ids": ids}
    bounds = {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 0.0, "dual_clip": 0.0}
    return LossInputs.of(**(bounds | given | changed))


def metrics_of(
    inputs: LossInputs, entropy: list[float], old_policy: str = "recomputed"
) -> dict[str, float]:
    _, metrics = policy_loss(
        doubled, inputs, weights=None, entropy=torch.tensor(entropy), old_policy=old_policy
    )
    return reduce(metrics, lambda values, _operation: values)


def test_the_loss_is_the_weighted_surrogate_negated_where_the_mask_is():
    inputs = inputs_of([True, True, False], advantages=torch.tensor([1.0, -3.0, 5.0]))
    weights = torch.tensor([0.5, 2.0, 7.0])
    loss, _ = policy_loss(
        doubled, inputs, weights=weights, entropy=torch.zeros(3), old_policy="recomputed"
    )
    assert loss.tolist() == [-1.0, 12.0, 0.0]
    loss, _ = policy_loss(
        doubled, inputs, weights=None, entropy=torch.zeros(3), old_policy="recomputed"
    )
    assert loss.tolist() == [-2.0, 6.0, 0.0]


def test_metrics_are_over_kept_tokens():
    policy = torch.tensor([0.0, -1.0, -9.0], requires_grad=True)
    inputs = inputs_of([True, True, False], policy_logprobs=policy)
    metrics = metrics_of(inputs, [1.0, 2.0, 99.0])
    assert metrics["loss/entropy/mean"] == 1.5
    assert metrics["loss/ratio/mean"] == 0.5
    assert metrics["loss/ratio/max"] == 1.0
    assert metrics["loss/clip_fraction_low/mean"] == 0.5
    # k3 of a log-ratio of -1: exp(-1) - 1 + 1
    assert metrics["loss/update_kl/mean"] == pytest.approx(0.36787944 / 2, rel=1e-6)


def test_the_kl_is_named_after_the_old_policy():
    inputs = inputs_of([True], policy_logprobs=torch.tensor([-1.0]))
    update, rollout = (metrics_of(inputs, [0.0], each) for each in ("recomputed", "rollout"))
    assert update["loss/update_kl/mean"] == rollout["loss/rollout_kl/mean"] > 0
    assert "loss/rollout_kl/mean" not in update and "loss/update_kl/mean" not in rollout


def test_shares_of_the_cap_and_the_dual_clip_are_told_where_they_are_on():
    keys = ("loss/clip_fraction_cap/mean", "loss/clip_fraction_dual/mean")
    assert not set(keys) & set(metrics_of(inputs_of([True] * 3), [0.0] * 3))
    bounds = {"ratio_cap": 20.0, "dual_clip": 3.0}
    metrics = metrics_of(inputs_of([True, True, True, False], **bounds), [0.0] * 4)
    assert [metrics[key] for key in keys] == pytest.approx([1 / 3, 2 / 3])


def test_inputs_are_masked_and_detached_but_for_the_policy():
    leaves = [torch.tensor([-0.5, torch.nan], requires_grad=True) for _ in range(3)]
    names = ("policy_logprobs", "old_logprobs", "advantages")
    inputs = inputs_of([True, False], **dict(zip(names, leaves)))
    for name in names:
        tensor = getattr(inputs, name)
        assert tensor.tolist() == [-0.5, 0.0]
        assert tensor.requires_grad == (name == "policy_logprobs")
    inputs.policy_logprobs.sum().backward()
    assert leaves[0].grad.tolist() == [1.0, 0.0]


def test_inputs_of_another_dtype_become_float32():
    inputs = inputs_of([True], policy_logprobs=torch.tensor([-0.5], dtype=torch.bfloat16))
    assert inputs.policy_logprobs.dtype == torch.float32


@pytest.mark.parametrize("name", ["policy_logprobs", "old_logprobs", "advantages", "sequence_ids"])
def test_shapes_of_inputs_must_agree(name):
    with pytest.raises(
        ValueError, match=rf"expected {name} of the mask's shape \(3,\), got \(1,\)"
    ):
        inputs_of([True] * 3, **{name: torch.zeros(1)})


@pytest.mark.parametrize("name", ["weights", "entropy"])
def test_shapes_of_weights_and_entropy_must_agree(name):
    given = {"weights": None, "entropy": torch.zeros(3)} | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"expected {name} of the mask's shape"):
        policy_loss(doubled, inputs_of([True] * 3), **given, old_policy="recomputed")
