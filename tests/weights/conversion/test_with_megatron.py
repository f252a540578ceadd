"""What is converted to Megatron is loaded by Megatron itself, in another layout, and what Megatron
saves is converted back to the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import write_small_model
from tests.support.ranks import run_module
from tools import convert_checkpoint

# model:layout of the ranks -> layout of the conversion
CASES = {
    "dense:tp2": ("--tensor", "4", "--pipeline", "2"),
    "tied:pp2_vpp2": ("--tensor", "2"),
    "moe:ep2": ("--expert", "4", "--pipeline", "2"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    for case, layout in CASES.items():
        model = folder / case.split(":")[0]
        write_small_model(model, model.name)
        assert convert_checkpoint.main([str(model), "-o", str(folder / case / "in"), *layout]) == 0
    run_module("tests.weights.conversion.megatron_ranks", folder, *CASES, ranks=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_back_from_megatron_are_the_same_bytes(case: str, saved: Path) -> None:
    model = saved / case.split(":")[0]
    back = saved / case / "back"
    arguments = [saved / case / "out", "-o", back, "--model", model, "--verify"]
    assert convert_checkpoint.main([str(each) for each in arguments]) == 0
    for path in model.iterdir():
        if path.name != "config.json":
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name
