"""Rounding to the grids of formats, by hand and by what a grid promises."""

import pytest
import torch

from megatron_rl.config import QuantizationConfig
from megatron_rl.weights.quantization import (
    BLOCK,
    engine_settings,
    int8_weight,
    is_quantized,
    quantized,
    quantized_shapes,
    rounded,
)

PROJECTION = "model.layers.3.mlp.down_proj.weight"
LARGEST = {"int8": 127.5, "int4": 7.5, "fp8": 448.0}  # half of the format's range


def test_projections_of_the_layers_are_rounded_and_nothing_else():
    assert is_quantized(PROJECTION)
    assert is_quantized("model.layers.0.mlp.experts.7.gate_proj.weight")
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate.weight",
    ):
        assert not is_quantized(name), name


def test_int4_by_hand():
    # scale = 7.5 / 7.5 = 1; -8 to 7 are the grid, halves go to the even neighbour.
    weight = torch.tensor([[7.5, 1.4, -1.6, 0.5, -0.5, 2.5]])
    expected = torch.tensor([[7.0, 1.0, -2.0, 0.0, 0.0, 2.0]])
    assert torch.equal(rounded(QuantizationConfig(format="int4"), weight), expected)


def test_int8_by_hand():
    weight = torch.tensor([[127.5, -3.4, 0.0], [0.255, -0.255, 0.0006]])
    integers, scale = int8_weight(weight)
    assert integers.tolist() == [[127, -3, 0], [127, -128, 0]]
    assert integers.dtype == torch.int8
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.002]]))
    torch.testing.assert_close(rounded(QuantizationConfig(format="int8"), weight), integers * scale)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("strategy", ["channel", "group", "block"])
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 7)])
def test_every_value_is_near_and_no_scale_reaches_further_than_it_should(kind, strategy, shape):
    torch.manual_seed(0)
    config = QuantizationConfig(format=kind, strategy=strategy, group_size=32)
    height, width = {"channel": (1, shape[1]), "group": (1, 32), "block": (BLOCK, BLOCK)}[strategy]
    weight = torch.randn(shape)
    got = rounded(config, weight)
    assert got.shape == weight.shape
    for top in range(0, shape[0], height):
        for left in range(0, shape[1], width):
            of_scale = (slice(top, top + height), slice(left, left + width))
            scale = weight[of_scale].abs().max() / LARGEST[kind]
            # Half a step of the grid (of e4m3: a 16th of the value); the edge is off by one step.
            step = scale if kind != "fp8" else weight[of_scale].abs() / 8 + scale
            assert ((got - weight)[of_scale].abs() <= step * 1.001).all()
            assert len((got[of_scale] / scale).round(decimals=2).unique()) <= 2 ** (
                4 if kind == "int4" else 8
            )
    alone = rounded(config, weight[:, : width * 2])  # what other groups hold changes nothing
    if strategy != "channel":
        assert torch.equal(alone, got[:, : width * 2])


def test_zeros_stay_zeros_and_bfloat16_stays_bfloat16():
    for kind in ("int8", "fp8", "int4"):
        got = rounded(QuantizationConfig(format=kind), torch.zeros(2, 8, dtype=torch.bfloat16))
        assert torch.equal(got, torch.zeros(2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["none", "int8", "fp8", "int4", "int8_w8a8"])
def test_what_is_announced_is_what_comes(kind):
    torch.manual_seed(0)
    config = QuantizationConfig(format=kind)
    learned = [("model.embed_tokens.weight", torch.randn(5, 4)), (PROJECTION, torch.randn(4, 6))]
    announced = quantized_shapes(
        config, [(name, tuple(tensor.shape)) for name, tensor in learned], torch.float32
    )
    sent = list(quantized(config, iter(learned)))
    assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent] == list(announced)
    assert torch.equal(sent[0][1], learned[0][1])
    assert torch.equal(sent[1][1], learned[1][1]) == (kind == "none")
    assert len(sent) == (3 if kind == "int8_w8a8" else 2)
    assert bool(engine_settings(config)) == (kind == "int8_w8a8")
