"""Measures for how long a checkpoint holds the step, if it is written beside the run and if it is
not, and what SHA-256 costs.

    NPROC=1 launch/torchrun.sh tools.bench_checkpoint WORK [--hidden 512] [--layers 8] [--rounds 5]

One rank on the CPU with a random Qwen3, whose state is filled and saved to WORK in turn in both
ways. Printed are the medians, their ratio, and the seconds of the thread that writes. The ratio is
of one run; the seconds depend on the disk of WORK.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a script finds tools/
from megatron_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.checkpoint_sums import check_sums
from megatron_rl.learner.model.checkpoint_writer import CheckpointWriter, Written
from megatron_rl.weights.geometry import read_geometry
from tools import make_tiny_model


def measure(learner: Learner, folder: Path, rounds: int) -> dict[bool, list[tuple[float, Written]]]:
    """The seconds of `save`, and what the checkpoint took, by whether it is asynchronous."""
    found: dict[bool, list[tuple[float, Written]]] = {False: [], True: []}
    writers = {
        each: CheckpointWriter(folder, learner.trained, keep=1, is_asynchronous=each)
        for each in found
    }
    for step in range(1, 2 * rounds + 3):
        is_asynchronous = step % 2 == 0
        started = time.monotonic()
        written = writers[is_asynchronous].save({"step": step}, step=step)
        seconds = time.monotonic() - started
        written = written or writers[is_asynchronous].finish()
        assert written is not None
        if step > 2:  # the first of each allocates its memory
            found[is_asynchronous].append((seconds, written))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    model, folder = options.work / "model", options.work / "checkpoints"
    sizes = f"--hidden {options.hidden} --layers {options.layers}"
    if not model.is_dir():
        make_tiny_model.main([str(model), *sizes.split()])
    parallel = initialize_parallel(ParallelConfig(), seed=0)
    learner = Learner(
        ModelConfig(path=str(model), dtype="float32"),
        OptimizerConfig(),
        read_geometry(model),
        parallel,
        num_updates=1,
    )
    found = measure(learner, folder, options.rounds)
    held = {each: statistics.median(seconds for seconds, _ in found[each]) for each in found}
    last = found[True][-1][1]
    started = time.monotonic()
    check_sums(folder / f"step_{last.step:06d}")
    print(
        f"{last.num_bytes / 1e6:.0f} MB: held for {held[False]:.3f} s if written meanwhile, "
        f"{held[True]:.3f} s if written beside the run: {held[True] / held[False]:.2f} of it; "
        f"the thread takes {last.write_seconds:.3f} s, of which SHA-256 {last.sum_seconds:.3f} s; "
        f"verification {time.monotonic() - started:.3f} s (medians of {options.rounds} in turn)"
    )
    shutil.rmtree(folder)
    shut_down_parallel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
