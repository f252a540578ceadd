"""A process that saves a checkpoint is ended at the n-th operation on its files, for every n or for
some; then the newest checkpoint that can be read must be the old one or the new one, bit for bit.

    python -m tests.learner.support.crash_while_saving MODEL FOLDER LIBRARY [NUM_POINTS]

LIBRARY is `tests/support/crash_points.c` as a library; it is loaded into every process that saves.
NUM_POINTS in each scenario and mode, half of them near the end; none given: all of them. Prints a
line for each scenario and mode: `SCENARIO, MODE: N operations, M points, OLD old, NEW new`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.errors import DataError
from megatron_rl.learner.layout.cpu_device import run_on_cpu
from megatron_rl.learner.model.checkpoint_files import checkpoints_by_age
from megatron_rl.learner.model.checkpoint_sums import check_sums, read_sums
from tests.support.checkpoint_reader import read_tensors

KILL, FAIL, POWER = range(3)
MODES = {KILL: "killed", FAIL: "disk error", POWER: "power failure"}
LAST = 24  # operations at the end, from the first rename on
CRASHED = 99  # exit code of the library
NORM = "decoder.final_layernorm.weight"
TOLD = 3  # of a process that ended with a DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The steps that were saved, the one that is, and how many are kept."""

    name: str
    before: tuple[int, ...]
    step: int
    keep: int


SCENARIOS = (
    Scenario(name="first", before=(), step=1, keep=2),
    Scenario(name="second", before=(1,), step=2, keep=2),
    Scenario(name="only one kept", before=(1,), step=2, keep=1),
    Scenario(name="the same step again", before=(1,), step=1, keep=1),
    Scenario(name="an abandoned run", before=(1, 4), step=2, keep=1),
)


def save(folder: Path, model: Path, scenario: Scenario, *, arm: Callable[[], None]) -> None:
    """Save the scenario's steps, whose weights are its numbers; armed before the last one."""
    from tests.learner.support import checkpoint_ranks
    from tests.learner.support.saving import save_checkpoint

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kind = checkpoint_ranks.KINDS[0]
    learner = checkpoint_ranks.build(kind, model, checkpoint_ranks.start("dp1"))

    def fill(value: float) -> None:
        for module in learner.trained.modules:
            for parameter in module.parameters():
                parameter.detach().fill_(value)

    for step in scenario.before:
        fill(step)
        save_checkpoint(folder, learner.trained, {"step": step}, step=step, keep=9)
    if 4 in scenario.before:  # the run was started over after step 1
        (folder / "latest").write_text("step_000001\n")
    fill(scenario.step + 0.5)
    arm()
    save_checkpoint(
        folder, learner.trained, {"step": scenario.step}, step=scenario.step, keep=scenario.keep
    )


def in_child(work: Callable[[], None]) -> int:
    """Do the work in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except DataError:
            code = TOLD
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest_readable(folder: Path) -> tuple[Path, float] | None:
    """The first checkpoint by age whose files are as they were written, and one of its weights."""
    for candidate in checkpoints_by_age(folder) if folder.is_dir() else []:
        try:
            check_sums(candidate)
        except DataError:
            continue
        assert read_sums(candidate) is not None, candidate
        tensors = read_tensors(candidate)
        value = tensors[NORM].flatten()[0]
        for name, tensor in tensors.items():
            if not name.startswith("optimizer") and "embedding" not in name:  # which is padded
                assert torch.equal(tensor, value.expand_as(tensor)), (candidate, name)
        return candidate, value.item()
    return None


def try_point(
    folder: Path, model: Path, scenario: Scenario, library: ctypes.CDLL, mode: int, n: int
) -> str:
    """`old` or `new`, after a crash at the n-th operation."""
    shutil.rmtree(folder, ignore_errors=True)

    def arm() -> None:
        library.crash_arm(os.fsencode(folder), ctypes.c_long(n), mode)

    code = in_child(lambda: save(folder, model, scenario, arm=arm))
    expected_codes = (CRASHED,) if mode != FAIL else (TOLD, 0)
    assert code in expected_codes, (scenario, MODES[mode], n, code)
    found = newest_readable(folder)
    old = 1.0 if scenario.before else None
    got = None if found is None else found[1]
    assert got in (old, scenario.step + 0.5), (scenario, MODES[mode], n, found)
    if code == 0:
        assert got != old, (scenario, MODES[mode], n)
    return "new" if got != old else "old"


def count_operations(folder: Path, model: Path, scenario: Scenario, library: ctypes.CDLL) -> int:
    """How many operations the scenario's last save has."""
    shutil.rmtree(folder, ignore_errors=True)
    counted = folder.with_name("counted")

    def work() -> None:
        save(
            folder,
            model,
            scenario,
            arm=lambda: library.crash_arm(os.fsencode(folder), ctypes.c_long(0), KILL),
        )
        counted.write_text(str(library.crash_count()))

    assert in_child(work) == 0
    return int(counted.read_text())


def some_points(num_operations: int, number: int, mode: int) -> list[int]:
    """Half of them among the last operations, in which names change, and others in each mode."""
    of_end = -(-number // 2)
    points = {num_operations - (mode + LAST * n // of_end) % LAST for n in range(of_end)}
    step = num_operations // (number - of_end + 1) or 1
    points |= {(1 + 7 * mode + step * n) % num_operations + 1 for n in range(number - of_end)}
    return sorted(points)


def main(model: Path, folder: Path, library_path: str, num_points: str = "") -> None:
    library = ctypes.CDLL(library_path)
    folder = folder.resolve() / "checkpoints"
    for scenario in SCENARIOS:
        num_operations = count_operations(folder, model, scenario, library)
        for mode, name in MODES.items():
            points = list(range(1, num_operations + 1))
            if num_points:
                points = some_points(num_operations, int(num_points), mode)
            results = [try_point(folder, model, scenario, library, mode, point) for point in points]
            print(
                f"{scenario.name}, {name}: {num_operations} operations, {len(points)} points, "
                f"{results.count('old')} old, {results.count('new')} new",
                flush=True,
            )


if __name__ == "__main__":
    run_on_cpu()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401

    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
