"""At learning rate 0 nothing may change: neither what is published nor what is received, and the
float32 engine stays as close to the learner as it was. The run is started for real, so that its
whole output is held against what is promised.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import read_jsonl, training
from tests.support.served_engine import ServedEngine

NUM_STEPS = 6
PROBE_BOUND = 2e-5  # of |d logprob| / max(1, |logprob|), float32 on both sides
# Of the discrepancy, a difference of probabilities in [0, 1].
FLAT_MEAN, FLAT_MAX = 1e-6, 1e-5


@pytest.mark.parametrize(
    "num_ranks",
    [0, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one process without torchrun", "TP2"],
)
def test_nothing_changes(
    num_ranks: int,
    tmp_path: Path,
    write_config: Callable[..., Path],
    served_engine: ServedEngine,
) -> None:
    config = write_config(
        tmp_path,
        parallel={"tensor": max(1, num_ranks)},
        learner={"tokens_per_micro_batch": 1024, "optimizer": {"learning_rate": 0.0}},
        loop={"num_steps": NUM_STEPS, "prompts_per_step": 4, "samples_per_prompt": 4},
    )
    run_dir = tmp_path / "run"
    with training(
        config,
        *served_engine.overrides(),
        num_ranks=num_ranks,
        run_dir=run_dir,
        variables=served_engine.variables(),
    ) as run:
        assert run.wait() == 0, run.output
        lines = run.output.splitlines()
    # What is started, the engines, the learner's implementations, what the verifiers make of the
    # expected answers; then a line a step, what the checkpoint took, the table, where the curves
    # are; nothing that a library has to say.
    starts, lines = lines[:5], lines[5:]
    starting, engines, learner, backend, expected = starts
    ranks = "2 ranks" if num_ranks else "1 rank"
    assert starting.startswith(f"starting: the learner on {ranks}; ")
    assert engines.startswith("engines: http://127.0.0.1:")
    assert learner.startswith("learner: layers of Megatron")
    assert backend.startswith("log-probs: C++ (")
    assert "expected answers, tried as responses" in expected
    num_lines = NUM_STEPS + 1
    assert [line.split()[:2] for line in lines[:num_lines]] == [
        ["step", str(step)] for step in range(num_lines)
    ]
    assert lines.pop(num_lines).startswith(f"checkpoint of step {NUM_STEPS}: ")
    assert lines[num_lines] == str(run_dir)
    assert all(line[0] in "┏┃┡│└" for line in lines[num_lines + 1 : -1])
    assert lines[-1].startswith("curves: tensorboard --logdir")

    syncs = read_jsonl(run_dir / "sync.jsonl")
    assert [line["version"] for line in syncs] == list(range(NUM_STEPS + 1))
    received = {
        checksum for line in syncs for each in line["received"].values() for checksum in each
    }
    assert {line["published"] for line in syncs} == received
    assert len(received) == 1

    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(NUM_STEPS + 1))
    probes = [line["sync/probe_relative_logprob_gap/max"] for line in metrics]
    assert max(probes) <= PROBE_BOUND
    for line in metrics[1:]:
        assert line["learner/learning_rate"] == 0
        assert line["learner/grad_norm"] > 1e-4  # there was something to learn from
        assert line["discrepancy/max"] <= FLAT_MAX
    means = [line["discrepancy/mean"] for line in metrics[1:]]
    print(f"probe {max(probes):.2e}, discrepancy mean {min(means):.2e} to {max(means):.2e}")
    assert max(means) <= FLAT_MEAN
