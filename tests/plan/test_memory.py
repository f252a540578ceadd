"""The plan of a rank's memory beside what torch reports, and numbers worked by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.plan.support.measured_memory import CASES
from tests.support.ranks import run_module

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("measured")
    run_module("tests.plan.support.measured_memory", out, ranks=1)
    return json.loads((out / "measured.json").read_text())


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("case", CASES)
def test_components_are_within_15_percent_of_what_torch_reports(
    case: str, component: str, measured: dict[str, Any]
) -> None:
    found = measured[case]
    assert found["planned"][component] == pytest.approx(found["measured"][component], rel=0.15)
