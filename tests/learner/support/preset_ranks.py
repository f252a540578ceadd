"""What the ranks of test_preset_layouts.py do: one optimizer step of presets in every layout of
this world size, beside the same step on one rank.

    torchrun --nproc_per_node N -m tests.learner.support.preset_ranks MODEL ROLLOUTS OUT \\
        LAYOUT,... PRESET,...

One rank first, which writes `OUT/dp1/<preset>.<batch>.pt`. In the other layouts rank 0 writes
`OUT/<layout>.json`: by preset and batch, how far loss, discrepancy, lambda and each gradient are
from those of one rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ObjectiveConfig
from megatron_rl.config.presets import PRESETS
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from tests.learner.support import edge_batch
from tests.learner.support.comparison import metrics_of, relative_difference
from tests.learner.support.step_ranks import Case, run_case
from tests.support.layouts import LAYOUTS

ALONE = "dp1"
# Of recorded.py: responses of mixed lengths, and few, so that of two replicas one keeps no token.
BATCHES = {"mixed": False, "sparse": True}
TOKENS_PER_ROW = 96  # several rows, of which the stages of a pipeline have more than one in flight


def run_preset(
    preset: str,
    is_sparse: bool,
    config: ObjectiveConfig,
    paths: tuple[Path, Path],
    parallel: Parallel,
) -> dict[str, Any]:
    case = Case(objective=preset, is_sparse=is_sparse, tokens_per_row=TOKENS_PER_ROW)
    has_heads = config.score_centering.enabled
    return run_case(case, *paths, parallel, config, has_heads=has_heads)


def distances(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far an outcome is from that of one rank."""
    figures, reference = metrics_of(found), metrics_of(expected)
    gradients = {}
    for name, tensor in expected["gradients"].items():
        other = found["gradients"][name]
        if tensor.any():
            gradients[name] = relative_difference(other, tensor)
        else:  # all is rejected
            gradients[name] = float("inf") if other.any() else 0.0
    worst = max(gradients, key=lambda name: gradients[name])
    loss = reference.get("loss/mean", 0.0)
    # A penalty in the loss can be larger than the advantages.
    scale = max(expected["shaped_advantage"], abs(loss))
    return {
        "loss": abs(figures.get("loss/mean", 0.0) - loss) / scale,
        "discrepancy": abs(figures["discrepancy/mean"] - reference["discrepancy/mean"]),
        "lambda": abs(found["reports"][0].dual_value - expected["reports"][0].dual_value),
        "gradient": gradients[worst],
        "worst": worst,
        "same_keys": figures.keys() == reference.keys(),
        "same_on_all_ranks": all(each == found["reports"][0] for each in found["reports"]),
        "kept": [sum(of_rank) for of_rank in found["kept"]],
        "num_moved": sum(tensor.any().item() for tensor in expected["gradients"].values()),
    }


def main(model: Path, rollouts: Path, out: Path, layouts: list[str], presets: list[str]) -> None:
    from megatron.core import parallel_state

    folder = out / f"presets.{os.environ['WORLD_SIZE']}.{os.environ['RANK']}"
    folder.mkdir()
    configs = edge_batch.preset_configs(folder, iter(PRESETS))
    (out / ALONE).mkdir(exist_ok=True)
    for layout in layouts:
        if LAYOUTS[layout].ranks != int(os.environ["WORLD_SIZE"]):
            continue
        parallel = initialize_parallel(LAYOUTS[layout].config(), seed=0)
        found = {}
        for preset in presets:
            for batch, is_sparse in BATCHES.items():
                objective = configs[preset].objective
                outcome = run_preset(preset, is_sparse, objective, (model, rollouts), parallel)
                path = out / ALONE / f"{preset}.{batch}.pt"
                if layout == ALONE:
                    torch.save(outcome, path)
                elif parallel.rank == 0:
                    expected = torch.load(path, weights_only=False)
                    found[f"{preset}.{batch}"] = distances(outcome, expected)
        if parallel.rank == 0:
            (out / f"{layout}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(*map(Path, sys.argv[1:4]), *(argument.split(",") for argument in sys.argv[4:]))
