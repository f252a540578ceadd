"""One recorded optimizer step of every objective preset is the same in every layout: loss,
discrepancy, lambda and, tensor by tensor, gradients; also where a rank keeps no token. A few
presets in the layouts that test_objectives.py does not have; all of them in all layouts are slow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.presets import PRESETS
from tests.learner.support.comparison import (
    DISCREPANCY_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
)
from tests.learner.support.preset_ranks import ALONE, BATCHES
from tests.support.layouts import LAYOUTS
from tests.support.ranks import run_module

FEW_PRESETS = ("dc_grpo", "gspo")
FEW_LAYOUTS = ("tp2_sp", "pp2_vpp2", "pp2_uneven", "tp2_sp_cp2", "cp2_pp2", "cp2_dp2")
# Which may reject or mask everything.
REJECTING = ("geometric_rejection", "k3_rejection", "sequence_mask")

Distances = dict[str, dict[str, dict[str, Any]]]


def run(paths: tuple[Path, Path, Path], layouts: Any, presets: Any) -> Distances:
    """By layout, then by preset and batch."""
    for ranks in (1, 2, 4):
        run_module(
            "tests.learner.support.preset_ranks",
            *paths,
            ",".join((ALONE, *layouts)),
            ",".join(presets),
            ranks=ranks,
            timeout=1800,
        )
    return {name: json.loads((paths[-1] / f"{name}.json").read_text()) for name in layouts}


@pytest.fixture(scope="module")
def few(
    four_layers: Path, recorded_rollouts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Distances:
    out = tmp_path_factory.mktemp("few_presets")
    return run((four_layers, recorded_rollouts, out), FEW_LAYOUTS, FEW_PRESETS)


def check(found: dict[str, Any], preset: str) -> None:
    assert found["same_keys"] and found["same_on_all_ranks"]
    # Products of ratios over a sequence amplify the rounding of log-probs.
    assert found["loss"] <= LOSS_TOLERANCE * (2 if preset == "sequence_mask" else 1)
    assert found["discrepancy"] <= DISCREPANCY_TOLERANCE
    assert found["lambda"] <= DISCREPANCY_TOLERANCE
    assert found["gradient"] <= GRADIENT_TOLERANCE, found["worst"]
    assert found["num_moved"] > 20 or preset in REJECTING


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("preset", FEW_PRESETS)
@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_a_step_does_not_depend_on_the_layout(
    layout: str, preset: str, batch: str, few: Distances
) -> None:
    check(few[layout][f"{preset}.{batch}"], preset)


def test_of_two_replicas_one_keeps_no_token(few: Distances) -> None:
    for preset in FEW_PRESETS:
        kept = few["cp2_dp2"][f"{preset}.sparse"]["kept"]
        assert sorted(kept)[:2] == [0, 0] and sorted(kept)[2] > 0


@pytest.mark.slow
def test_every_preset_in_every_layout(
    four_layers: Path, recorded_rollouts: Path, tmp_path: Path
) -> None:
    layouts = [name for name in LAYOUTS if name != ALONE]
    found = run((four_layers, recorded_rollouts, tmp_path), layouts, PRESETS)
    failures = []
    for layout, of_layout in found.items():
        assert len(of_layout) == len(PRESETS) * len(BATCHES)
        for name, each in of_layout.items():
            try:
                check(each, name.split(".")[0])
            except AssertionError:
                failures.append((layout, name, each))
    for key in ("loss", "discrepancy", "lambda", "gradient"):
        worst = max(
            (each[key], layout, name)
            for layout, of_layout in found.items()
            for name, each in of_layout.items()
        )
        print(f"worst {key}: {worst[0]:.2e}, {worst[1]}, {worst[2]}")
    assert not failures, [failure[:2] for failure in failures]
