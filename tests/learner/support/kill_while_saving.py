"""Ranks that save checkpoints without end, killed at random moments; their successors load.

    python -m tests.learner.support.kill_while_saving MODEL ROLLOUTS FOLDER

One process imports everything and forks two ranks, time after time; prints `resumed N` for every
start but the first, and `partial was there` when a kill had fallen into a save.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from megatron_rl.learner.layout.cpu_device import run_on_cpu

NUM_KILLS, NUM_RANKS = 5, 2
START_TIMEOUT_SECONDS = 60


def rank_main(rank: int, meeting: Path, model: Path, rollouts: Path, folder: Path) -> None:
    """Load what is there, then save one step after the other until the end comes."""
    from megatron_rl.learner.model.checkpoint_files import latest_checkpoint
    from megatron_rl.objective.constraint import DualVariable
    from tests.learner.support import checkpoint_ranks

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=NUM_RANKS
    )
    kind, dual = checkpoint_ranks.KINDS[0], DualVariable(0.5)
    learner = checkpoint_ranks.build(kind, model, checkpoint_ranks.start(kind.layout))
    latest, step = latest_checkpoint(folder), 0
    if latest is not None:
        step = checkpoint_ranks.load(latest, learner, dual)
        assert latest.name == f"step_{step:06d}"
        if rank == 0:
            print(f"resumed {step}", flush=True)
    checkpoint_ranks.train(learner, rollouts, dual, range(1, 2))
    while True:
        step += 1
        checkpoint_ranks.save(folder, learner, dual, step)
        (folder / "alive").touch()


def fork_ranks(meeting: Path, model: Path, rollouts: Path, folder: Path) -> list[int]:
    """Two ranks, each the leader of a process group of its own."""
    pids = []
    for rank in range(NUM_RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                rank_main(rank, meeting, model, rollouts, folder)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        pids.append(pid)
    return pids


def main(model: Path, rollouts: Path, folder: Path) -> int:
    rng = random.Random(11)
    for attempt in range(NUM_KILLS + 1):
        (folder / "alive").unlink(missing_ok=True)
        pids = fork_ranks(folder / f"meeting_{attempt}", model, rollouts, folder)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not (folder / "alive").exists():
            if time.monotonic() > deadline or any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
                print(f"start {attempt}: the ranks did not save", flush=True)
                return 1
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.6))
        rng.shuffle(pids)
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)  # with what it forked to write
            os.waitpid(pid, 0)
            time.sleep(rng.uniform(0.0, 0.02))
        if any(folder.glob(".partial_step_*")):
            print("partial was there", flush=True)
    return 0


if __name__ == "__main__":
    run_on_cpu()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401

    sys.exit(main(*map(Path, sys.argv[1:])))
