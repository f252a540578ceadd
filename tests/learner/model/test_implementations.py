"""What computes the layers and the optimizer's steps: what is installed, and what is asked for."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from megatron_rl.config import KernelConfig, ModelConfig, OptimizerConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.model import implementations
from megatron_rl.learner.model.implementations import (
    adam_of,
    check_implementations,
    describe_implementations,
    uses_transformer_engine,
)

TE = ("transformer_engine",)
APEX = ("apex", "amp_C")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """`machine("apex", ...)`: one with a GPU on which these modules are installed."""

    def set_up(*modules: str) -> None:
        monkeypatch.setattr(implementations, "is_cpu_run", lambda: False)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: SimpleNamespace() if name in modules else None
        )

    return set_up


def model(**kernels: object) -> ModelConfig:
    return ModelConfig(dtype="bfloat16", kernels=KernelConfig(**kernels))


def test_nothing_but_the_cpu_profile_on_a_cpu() -> None:
    check_implementations(ModelConfig(), OptimizerConfig(implementation="torch"))
    assert not uses_transformer_engine(ModelConfig())
    assert adam_of("auto") == "torch"
    line = describe_implementations(ModelConfig(), OptimizerConfig())
    assert line == (
        "layers of Megatron, norms of torch, packed attention, float32; fused AdamW of torch"
    )


@pytest.mark.parametrize(
    ("modules", "has_layers", "adam"),
    [
        ((), False, "torch"),
        (("apex",), False, "torch"),  # the package of that name on PyPI
        (APEX, False, "apex"),
        (TE, True, "transformer_engine"),
        ((*TE, *APEX), True, "transformer_engine"),
    ],
)
def test_what_is_installed_answers(machine, modules, has_layers, adam) -> None:
    machine(*modules)
    assert uses_transformer_engine(model()) == has_layers
    assert not uses_transformer_engine(model(layers="megatron"))
    assert adam_of("auto") == adam
    assert adam_of("torch") == "torch"
    check_implementations(model(), OptimizerConfig())


def test_one_line_says_which_answered(machine, monkeypatch) -> None:
    machine(*TE)
    monkeypatch.setattr(implementations, "_version", lambda: "2.20.2")
    chosen = model(fp8="delayed", fused_rope=True, deterministic=True)
    assert describe_implementations(chosen, OptimizerConfig()) == (
        "layers, fused norms and attention of Transformer Engine 2.20.2, bfloat16; FusedAdam of "
        "Transformer Engine; FP8 (delayed); fused rope; deterministic"
    )


ASKED = [
    ({"layers": "transformer_engine"}, {}, "model.kernels.layers=transformer_engine", TE),
    ({"attention": "flash"}, {}, "model.kernels.attention=flash", TE),
    ({"fp8": "current"}, {}, "model.kernels.fp8=current", TE),
    ({"fused_rope": True}, {}, "model.kernels.fused_rope=true", TE),
    (
        {"fused_gradient_accumulation": True},
        {},
        "model.kernels.fused_gradient_accumulation=true",
        ("fused_weight_gradient_mlp_cuda",),
    ),
    (
        {},
        {"implementation": "transformer_engine"},
        "learner.optimizer.implementation=transformer_engine",
        TE,
    ),
    ({}, {"implementation": "apex"}, "learner.optimizer.implementation=apex", APEX),
]


@pytest.mark.parametrize(("kernels", "optimizer", "message", "needed"), ASKED)
def test_what_is_asked_for_and_missing_is_an_error(
    machine, kernels, optimizer, message, needed
) -> None:
    settings = model(**kernels), OptimizerConfig(**optimizer)
    with pytest.raises(ConfigError, match="got no GPU") as caught:
        check_implementations(*settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    others = {*TE, *APEX, "fused_weight_gradient_mlp_cuda"} - set(needed)
    machine(*others)
    with pytest.raises(ConfigError, match="got none installed"):
        check_implementations(*settings)
    machine(*needed)
    check_implementations(*settings)
