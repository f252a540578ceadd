"""Every format: what is stored is, dequantised, within half a step of the weight, and the scales
are those worked by hand.
"""

from __future__ import annotations

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.weights.conversion.formats import (
    CALIBRATED,
    FORMATS,
    Format,
    compressed,
    config_of,
    decompressed,
)

GROUP = 32
# Half a step of the format, relative to the largest |w| of a scale: INT of b bits has 2^b - 1 steps
# in the range, the largest steps of E4M3 are 32 of 448, and those of E2M1 2 of 6.
HALF_STEPS = {
    "fp8": 16 / 448,
    "fp8_channel": 16 / 448,
    "fp8_block": 16 / 448,
    "int8": 1 / 255,
    "int4_awq": 1 / 15,
    "nvfp4": 1 / 6 * (1 + 1 / 16) + 1 / 256,  # scales are rounded to FP8, results to bfloat16
}


def largest_of_parts(kind: Format, weight: torch.Tensor) -> torch.Tensor:
    """For each number the largest |w| that has the same scale, found number by number."""
    rows, columns = weight.shape
    size, found = weight.abs(), torch.empty_like(weight)
    for row in range(rows):
        for column in range(0, columns, 16):
            part = {
                "fp8": size,
                "fp8_channel": size[row],
                "int8": size[row],
                "fp8_block": size[row // 128 * 128 : row // 128 * 128 + 128][
                    :, column // 128 * 128 : column // 128 * 128 + 128
                ],
                "int4_awq": size[row, column // GROUP * GROUP : column // GROUP * GROUP + GROUP],
                "nvfp4": size[row, column : column + 16],
            }[kind]
            found[row, column : column + 16] = part.max()
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantised_is_within_half_a_step(kind: Format) -> None:
    torch.manual_seed(0)
    weight = torch.randn(160, 192) * torch.rand(160, 1)
    stored = compressed(kind, weight, group_size=GROUP, largest_input=torch.tensor(3.0))
    back = decompressed(kind, stored, group_size=GROUP)
    allowed = largest_of_parts(kind, weight) * HALF_STEPS[kind] * 1.001
    assert back.shape == weight.shape
    assert ((back - weight).abs() <= allowed).all()
    assert (back - weight).abs().max() > 0.3 * HALF_STEPS[kind] * weight.abs().max() / 10


def test_scales_worked_by_hand() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 3], weight[1, 17] = 448.0, -44.8
    fp8 = compressed("fp8", weight, group_size=16, largest_input=torch.tensor(896.0))
    assert fp8["weight_scale"].tolist() == [1.0] and fp8["input_scale"].tolist() == [2.0]
    channel = compressed("fp8_channel", weight, group_size=16)
    torch.testing.assert_close(channel["weight_scale"], torch.tensor([[1.0], [0.1]]))
    int8 = compressed("int8", weight, group_size=16, largest_input=torch.tensor(254.0))
    torch.testing.assert_close(int8["weight_scale"], torch.tensor([[896 / 255], [89.6 / 255]]))
    assert int8["input_scale"].tolist() == [2.0]
    int4 = compressed("int4_awq", weight, group_size=16)
    torch.testing.assert_close(int4["weight_scale"][0, 0].item(), 896 / 15)
    assert int4["weight_shape"].tolist() == [2, 32]
    assert int4["weight_packed"].shape == (2, 4) and int4["weight_packed"].dtype is torch.int32
    nvfp4 = compressed("nvfp4", weight, group_size=16, largest_input=torch.tensor(6.0))
    assert nvfp4["weight_global_scale"].tolist() == pytest.approx([448 * 6 / 448])
    assert nvfp4["input_global_scale"].tolist() == pytest.approx([448.0])
    joined = torch.tensor(896.0)  # of another weight that the engine joins with this one
    nvfp4 = compressed(
        "nvfp4", weight, group_size=16, largest_weight=joined, largest_input=torch.tensor(6.0)
    )
    assert nvfp4["weight_global_scale"].tolist() == pytest.approx([3.0])


def test_groups_that_do_not_divide_the_columns() -> None:
    with pytest.raises(ConfigError, match="divisor of the 48 columns of a weight, got 32"):
        compressed("int4_awq", torch.ones(4, 48), group_size=32)


@pytest.mark.parametrize("kind", FORMATS)
def test_compressed_tensors_reads_the_settings(kind: Format) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    settings = config_of(kind, GROUP)["quantization_config"]
    read = QuantizationConfig.model_validate(settings)
    group = read.config_groups["group_0"]
    assert read.format == settings["format"] and "lm_head" in read.ignore
    is_static = group.input_activations is not None and group.input_activations.dynamic is False
    assert is_static == (kind in ("fp8", "int8"))
    assert kind in CALIBRATED or group.input_activations.dynamic is True
