"""AdamW in FusedAdam's layout against torch's own."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.learner.model.adam import FusedLayoutAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7,), (2, 2, 2))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def test_five_steps_are_bit_equal_to_torch() -> None:
    ours, theirs = parameters(), parameters()
    # Two groups, one without decay, as Megatron makes them.
    split = lambda params: [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]  # noqa: E731
    optimizer = FusedLayoutAdamW(split(ours), **SETTINGS)
    reference = torch.optim.AdamW(split(theirs), fused=True, **SETTINGS)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 1e-2 / (step + 1)  # a schedule's doing
            each.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs))
    for mine, other in zip(ours, theirs):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[mine][moment], reference.state[other][moment])


def test_the_first_step_by_hand() -> None:
    """m / (1 - b1) = g and v / (1 - b2) = g^2: a step of lr against the sign, after the decay."""
    param = torch.nn.Parameter(torch.tensor([2.0, -4.0]))
    param.grad = torch.tensor([0.5, -0.25])
    FusedLayoutAdamW([param], **SETTINGS).step()
    expected = [2.0 * (1 - 1e-3) - 1e-2, -4.0 * (1 - 1e-3) + 1e-2]
    assert param.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_step_is_counted_in_the_group_and_nowhere_else() -> None:
    params = parameters()
    optimizer = FusedLayoutAdamW(params, **SETTINGS)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert all(set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"} for param in params)


def test_goes_on_from_a_saved_state() -> None:
    straight, stopped = parameters(), parameters()
    first = FusedLayoutAdamW(straight, **SETTINGS)
    second = FusedLayoutAdamW(stopped, **SETTINGS)
    for step in range(4):
        if step == 2:
            state = second.state_dict()
            second = FusedLayoutAdamW(stopped, **SETTINGS)
            second.load_state_dict(state)
        for params, optimizer in ((straight, first), (stopped, second)):
            give_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(mine, other) for mine, other in zip(straight, stopped))


def test_a_parameter_without_a_gradient_stays() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = FusedLayoutAdamW(params, **SETTINGS)
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("option", [{"adam_w_mode": False}, {"capturable": True}])
def test_what_it_does_not_do_is_refused(option: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=f"got {next(iter(option))}="):
        FusedLayoutAdamW(parameters(), **SETTINGS, **option)
