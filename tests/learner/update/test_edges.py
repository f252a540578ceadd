"""Edges of the learner that one rank shows: a batch without a kept token, what a checkpoint weighs,
an old one that cannot be deleted.

    torchrun --nproc_per_node 1 -m tests.learner.update.test_edges MODEL OUT      what the rank does
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.learner.batch.packing import empty_micro_batch
from megatron_rl.learner.model.checkpoint import LATEST, latest_checkpoint, save_checkpoint
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import TrainBatch
from megatron_rl.weights.geometry import read_geometry
from tests.torchrun import run_module

# (dtype, distributed optimizer) -> bytes a parameter
WEIGHTS = {
    ("float32", False): 12,
    ("float32", True): 16,
    ("bfloat16", False): 14,
    ("bfloat16", True): 14,
}
METADATA_BYTES = 300_000  # names, shapes and random state; at the most, for so small a model


@pytest.fixture(scope="module")
def outcome(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("edges")
    run_module("tests.learner.update.test_edges", tiny_checkpoint, out, ranks=1)
    return torch.load(out / "outcome.pt", weights_only=False)


def test_a_batch_without_a_kept_token_is_told(outcome: dict[str, Any]) -> None:
    assert "expected a finite mean discrepancy, got nan" in outcome["empty"]
    assert "no response token at all" in outcome["empty"]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_estimate_is_what_a_checkpoint_weighs(
    kind: tuple[str, bool], outcome: dict[str, Any]
) -> None:
    estimate, num_bytes, num_parameters = outcome["sizes"][kind]
    assert estimate == WEIGHTS[kind]
    assert estimate * num_parameters <= num_bytes < estimate * num_parameters + METADATA_BYTES
    assert 4 * num_parameters > METADATA_BYTES  # else another estimate would pass too


def test_an_old_one_that_stays_is_no_failed_checkpoint(outcome: dict[str, Any]) -> None:
    assert "step 2 in" in outcome["stuck"]
    assert "it is whole and the latest" in outcome["stuck"]
    assert "NotADirectoryError" in outcome["stuck"]
    assert "earlier checkpoints are untouched" not in outcome["stuck"]
    assert outcome["latest"] == "step_000002"


def main(model: Path, out: Path) -> None:
    from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
    from megatron_rl.learner.learner import Learner
    from megatron_rl.learner.model import checkpoint
    from megatron_rl.learner.update.step import train_step

    parallel = initialize_parallel(ParallelConfig(timeout_seconds=60), seed=0)
    found: dict[str, Any] = {"sizes": {}}
    batch = TrainBatch(mini_batches=((empty_micro_batch(64),),))
    for dtype, is_distributed in WEIGHTS:
        learner = Learner(
            ModelConfig(path=str(model), dtype=dtype),
            OptimizerConfig(distributed=is_distributed),
            read_geometry(model),
            parallel,
            num_updates=2,
        )
        try:
            train_step(
                learner,
                batch,
                DualVariable(0.1),
                ObjectiveConfig(),
                step=1,
                weight_version=0,
                should_recompute=False,
            )
        except DivergenceError as error:
            found["empty"] = str(error)
        folder = out / f"{dtype}_{is_distributed}"
        written = save_checkpoint(folder, learner, {}, step=1, keep=1)
        found["sizes"][dtype, is_distributed] = (
            checkpoint._bytes_per_parameter(learner),
            sum(path.stat().st_size for path in written.iterdir()),
            sum(torch.Size(shape).numel() for _, shape in learner.tensor_shapes()),
        )
    (folder / "step_000000").touch()  # a file where a folder is expected
    try:
        save_checkpoint(folder, learner, {}, step=2, keep=1)
    except DataError as error:
        found["stuck"] = str(error)
    found["latest"] = (folder / LATEST).read_text().strip()
    assert latest_checkpoint(folder) == folder / found["latest"]
    torch.save(found, out / "outcome.pt")
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:]))
