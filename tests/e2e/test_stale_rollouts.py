"""Weights published every third step: rollouts are 0, 1 and 2 steps old, a run that is stopped goes
on with the weights that the engine served, and the tolerance counts from the gap of fresh weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl.rollout.recording import read_step
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine

EVERY = 3
FRESH_MAX = 1e-5  # of the discrepancy, with a float32 engine that serves the learner's weights
STALE_MEAN = 1e-4
TOLERANCE = 1e-3


def test_rollouts_are_as_old_as_the_weights(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    config = write_config(
        tmp_path,
        sync={"every": EVERY},
        checkpoint={"every": EVERY, "save_hf": False},
        objective={"constraint": {"tolerance": TOLERANCE, "tolerance_above": "fresh_gap"}},
        rollout={"sampling": {"max_tokens": 20}},
        loop={"prompts_per_step": 4, "samples_per_prompt": 4},
    )
    run_dir = tmp_path / "run"
    for num_steps in (EVERY, 2 * EVERY):  # the second run from the checkpoint of the first
        train_to_the_end(
            config,
            f"loop.num_steps={num_steps}",
            num_ranks=0,
            run_dir=run_dir,
            engine=served_engine,
        )

    assert [line["version"] for line in read_jsonl(run_dir / "sync.jsonl")] == [0, 3, 6]
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(2 * EVERY + 1))
    probed = [line["step"] for line in metrics if "sync/probe_gap/mean" in line]
    assert probed == [0, 3, 6]
    for line in metrics[1:]:
        step = line["step"]
        age = (step - 1) % EVERY
        groups = [each.group for each in read_step(run_dir / "rollouts", step)]
        versions = {v for g in groups for r in g.rollouts for v in r.weight_versions}
        assert versions == {-1, step - 1 - age}
        assert line["discrepancy/age/mean"] == line["discrepancy/age/max"] == age
        bins = {key.rpartition("/")[0] for key in line if key.startswith("discrepancy/age_")}
        assert bins == {f"discrepancy/age_{('0', '1', '2_plus')[age]}"}
        # p_train is of the learner's present weights: an older engine is further away.
        if age == 0:
            assert line["discrepancy/max"] <= FRESH_MAX
        else:
            assert line["discrepancy/mean"] >= STALE_MEAN
        measured = [metrics[at]["sync/fresh_gap/mean"] for at in probed if at < step]
        assert 0 < line["constraint/fresh_gap"] == sum(measured) / len(measured) < FRESH_MAX
        assert line["constraint/tolerance"] == TOLERANCE + line["constraint/fresh_gap"]
