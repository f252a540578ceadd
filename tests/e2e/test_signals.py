"""Runs that are stopped and killed in every phase of a step, and continue: exit code and reason,
nothing left of them within ten seconds, and a record without gap or double once they have been
resumed.

All cases of a test share one run folder: each resumes what the one before left. Where the engine
matters, the run has its own; the others, and the run that is finished, are given the served one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.learner.model.checkpoint_files import latest_checkpoint
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.rollout.recording import read_recomputed, read_step
from tests.e2e.reward import COUNT_VARIABLE
from tests.e2e.runs import TrainingProcess, read_jsonl, train_to_the_end, training
from tests.support.served_engine import ServedEngine

PROMPTS, SAMPLES = 8, 8  # of a step
TRIED = 4  # expected answers of held-out prompts, scored at the start of a launch
ENGINE_ROLES = ("server", "engine core", "guard")
LEFT_SECONDS = 10.0  # in which every process must be gone
PHASES = ("start", "rollout", "learner", "sync", "checkpoint")
CASES = (
    ("SIGINT", "torchrun"),
    ("SIGTERM", "torchrun"),
    ("SIGKILL", "torchrun"),
    ("SIGKILL", "rank 0"),
    ("SIGKILL", "rank 1"),
    ("SIGKILL", "server"),
    ("SIGKILL", "engine core"),
    ("SIGKILL", "guard"),
)


def latest_step(run_dir: Path) -> int:
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(phase: str, run: TrainingProcess, run_dir: Path) -> None:
    """Returns when the run is in the phase; "start" is while the engine loads. Any but "start" is
    of the second step that this launch does, the first from "rollout" on.
    """
    log, scored = run_dir / "logs" / "engine_0.log", run_dir / "scored"
    if phase == "start":
        begin = size(log)
        run.wait_until(lambda: size(log) > begin)
        return
    before = latest_step(run_dir)
    run.wait_until(lambda: latest_step(run_dir) > before)
    if phase == "rollout":
        return
    if phase == "learner":
        run.wait_until(lambda: size(scored) >= TRIED + 2 * PROMPTS * SAMPLES)
        time.sleep(0.1)  # from the last score to the learner
    elif phase == "sync":
        begin = size(run_dir / "sync.jsonl")
        run.wait_until(lambda: size(run_dir / "sync.jsonl") > begin)
    else:
        partial = run_dir / "checkpoints" / f".partial_step_{before + 2:06d}"
        run.wait_until(partial.exists)


def stop_at(
    config: Path,
    run_dir: Path,
    phase: str,
    signal_name: str,
    role: str,
    engine: ServedEngine | None = None,
) -> None:
    """Start or resume, stop at the phase, and hold what comes of it against the promises.

    Args:
        engine: that the run is given; None: it starts its own.
    """
    case = f"{signal_name} to {role} at {phase}"
    scored = run_dir / "scored"
    scored.unlink(missing_ok=True)
    variables = {COUNT_VARIABLE: str(scored)} | (engine.variables() if engine else {})
    given = engine.overrides() if engine else []
    with training(config, *given, num_ranks=2, run_dir=run_dir, variables=variables) as run:
        wait_for(phase, run, run_dir)
        run.pids()  # from now on known, whatever becomes of their parents
        os.kill(run.pid_of(role), signal.Signals[signal_name])
        begin = time.monotonic()
        if phase == "start" and role in ENGINE_ROLES:
            # The learner is built first; then the run looks at the engine.
            run.wait(60.0)
        left = run.left_after(LEFT_SECONDS)
        seconds = time.monotonic() - begin
        assert left == [], f"{case}: left after {LEFT_SECONDS} s:\n{left}\n{run.output}"
        code, output = run.wait(1.0), run.output
    assert code != 0, f"{case}:\n{output}"
    assert re.search(expected_reason(signal_name, role), output), f"{case}:\n{output}"
    # After an unknown error torchrun ends in a traceback of its own; none of ours stands before it.
    assert 'train.py", line' not in output, f"{case}:\n{output}"
    if signal_name != "SIGKILL":
        assert "torch/distributed" not in output, f"{case}:\n{output}"
    assert re.search(r"\((EngineCore|APIServer) pid=", output) is None, f"{case}:\n{output}"
    words = re.findall(r"^stopped by .*", output, re.MULTILINE)
    print(f"{case}: exit code {code}, gone in {seconds:.1f} s, {words or 'no last words'}")


def expected_reason(signal_name: str, role: str) -> str:
    if signal_name != "SIGKILL":
        return rf"(?m)^stopped by {signal_name}: (in step \d+, phase|before the first step)"
    if role == "engine core":
        return r"(?m)^EngineError: engine 0 .*its EngineCore process died .*see dmesg"
    if role in ENGINE_ROLES:
        # On a busy machine the guard may see EngineCore end before the server that was killed.
        return r"(?m)^EngineError: engine 0 .*(ended by SIGKILL|EngineCore process died)"
    if role == "torchrun":
        return ""  # nobody is left to say it
    return r"Signal 9 \(SIGKILL\) received by PID"


def finish(config: Path, run_dir: Path, engine: ServedEngine) -> int:
    """Resume, do two more steps, end well; returns the number of steps of the whole run."""
    num_steps = latest_step(run_dir) + 2
    train_to_the_end(
        config, f"loop.num_steps={num_steps}", num_ranks=2, run_dir=run_dir, engine=engine
    )
    return num_steps


def check_records(config_path: Path, run_dir: Path, num_steps: int) -> None:
    """Every step once, lambda an unbroken chain, every prompt once and the right one."""
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(num_steps + 1))
    assert "constraint/lambda" not in metrics.pop(0)  # before the first step

    config = load_config(str(config_path), [f"run_dir={run_dir}"])
    constraint = config.objective.constraint
    dual = DualVariable(
        constraint.initial,
        constraint.learning_rate,
        constraint.tolerance,
        constraint.minimum,
        constraint.maximum,
    )
    expected = constraint.initial
    for line in metrics:  # what a run that nobody stopped would have made of these discrepancies
        assert line["constraint/lambda"] == pytest.approx(expected, abs=1e-12)
        expected = dual.update(line["discrepancy/mean"])
        assert line["constraint/next_lambda"] == pytest.approx(expected, abs=1e-12)
    assert len({line["discrepancy/mean"] for line in metrics}) == num_steps

    tokenizer = load_tokenizer(config.model.path, 128)
    stream = PromptStream(config.data, tokenizer, 156)
    for step in range(1, num_steps + 1):
        groups = [each.group for each in read_step(run_dir / "rollouts", step)]
        assert [group.prompt for group in groups] == stream.prompts((step - 1) * PROMPTS, PROMPTS)
        versions = {v for g in groups for r in g.rollouts for v in r.weight_versions}
        assert versions == {-1, step - 1}
        assert len(read_recomputed(run_dir / "rollouts", step)) == PROMPTS * SAMPLES
    steps = {int(path.name[5:11]) for path in (run_dir / "rollouts").glob("step_*")}
    assert steps == set(range(1, num_steps + 1))
    state = json.loads((run_dir / f"checkpoints/step_{num_steps:06d}/run_state.json").read_text())
    assert state["run"]["next_prompt"] == num_steps * PROMPTS


@pytest.fixture
def config(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """Many steps, a checkpoint after each; a BF16 learner, whose gap to the engine moves lambda."""
    return write_config(
        tmp_path,
        parallel={"tensor": 2},
        model={"dtype": "bfloat16"},
        learner={
            "tokens_per_micro_batch": 1024,
            "mini_batches_per_step": 2,
            "recompute": "always",
            "optimizer": {"learning_rate": 1e-3},
        },
        checkpoint={"every": 1, "save_hf": False},
        rollout={"max_restarts": 0},  # an engine that ends is the end of the run
        loop={"num_steps": 1000, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
    )


def test_a_run_that_is_stopped_again_and_again_ends_as_one(
    config: Path, served_engine: ServedEngine
) -> None:
    run_dir = config.parent / "run"
    stop_at(config, run_dir, "rollout", "SIGTERM", "torchrun", served_engine)
    stop_at(config, run_dir, "checkpoint", "SIGKILL", "rank 0", served_engine)
    stop_at(config, run_dir, "rollout", "SIGKILL", "engine core")
    stop_at(config, run_dir, "sync", "SIGKILL", "torchrun")
    check_records(config, run_dir, finish(config, run_dir, served_engine))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_every_signal_at(phase: str, config: Path, served_engine: ServedEngine) -> None:
    run_dir = config.parent / "run"
    for signal_name, role in CASES:
        stop_at(config, run_dir, phase, signal_name, role)
    check_records(config, run_dir, finish(config, run_dir, served_engine))
