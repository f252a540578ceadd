"""The figures of the machines' use, worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.loop.machine import (
    GIB,
    RankUse,
    active_parameters,
    machine_figures,
    omission,
    peak_of,
    sync_figures,
    update_flops,
)
from megatron_rl.plan.parameters import num_parameters
from megatron_rl.weights.geometry import Geometry, read_geometry


def use(learner: float, *, num_tokens: int = 0, attended: int = 0) -> RankUse:
    return RankUse(
        seconds={"learner": learner, "evaluate": 9.0},
        num_tokens=num_tokens,
        attended=attended,
        host_bytes=learner * GIB,
        device_bytes=2 * learner * GIB,
    )


@pytest.fixture
def geometry(tiny_checkpoint: Path) -> Geometry:
    return read_geometry(tiny_checkpoint)


def test_parameters_that_a_token_passes(geometry: Geometry) -> None:
    assert active_parameters(geometry) == num_parameters(geometry) - 128 * 64  # the embedding


def test_the_slowest_rank_and_memory(geometry: Geometry) -> None:
    figures = machine_figures(
        [use(1.0), use(3.0), use(2.0)],
        geometry,
        has_separate_pass=False,
        device_name="",
        peak_tflops=0.0,
    )
    assert figures == {
        "speed/slowest_seconds/learner": 3.0,
        "speed/slowest_rank/learner": 1.0,
        "speed/memory/host_gib/max": 3.0,
    }


def test_mfu(geometry: Geometry) -> None:
    uses = [use(2.0, num_tokens=1000, attended=500_000), use(4.0, num_tokens=500, attended=100)]
    # 2 layers of 4 heads of 32
    flops = 6.0 * active_parameters(geometry) * 1500 + 6.0 * 2 * 4 * 32 * 500_100
    assert update_flops(geometry, uses, has_separate_pass=False) == flops
    assert update_flops(geometry, uses, has_separate_pass=True) == pytest.approx(4 / 3 * flops)
    figures = machine_figures(
        uses, geometry, has_separate_pass=False, device_name="NVIDIA H100 80GB", peak_tflops=0.0
    )
    assert figures["speed/mfu"] == pytest.approx(flops / (4.0 * 2 * 989e12))
    assert figures["speed/memory/gpu_gib/max"] == 8.0 and figures["speed/num_gpus"] == 2.0
    assert "speed/mfu" not in machine_figures(
        uses, geometry, has_separate_pass=False, device_name="NVIDIA Z1", peak_tflops=0.0
    )


def test_the_peak_of_a_device() -> None:
    assert peak_of("NVIDIA H100 PCIe", 0.0) == 756e12
    assert peak_of("NVIDIA H100 PCIe", 700.0) == 700e12
    assert omission("NVIDIA H200", 0.0) == ""
    assert omission("", 0.0) == ""  # the CPU
    assert "set learner.peak_tflops" in omission("NVIDIA Z1", 0.0)


def test_the_bandwidth_of_a_sync(tmp_path: Path) -> None:
    log = tmp_path / "sync.jsonl"
    assert sync_figures(log, 1) == {}
    lines = [{"version": v, "bytes": v * 2**30, "seconds": {"total": 0.5}} for v in (1, 2)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sync_figures(log, 2) == {"speed/sync_gib_per_second": 4.0}
    assert sync_figures(log, 3) == {}
