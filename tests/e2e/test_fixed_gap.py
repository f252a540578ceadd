"""One recorded step, scored by learner and engine while another run trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl.rollout.recording import read_step
from tests.e2e.gaps import BOUND
from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine


def test_both_sides_score_the_same_recorded_tokens(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    loop = {"num_steps": 1, "prompts_per_step": 4, "samples_per_prompt": 4}
    config = write_config(
        tmp_path, loop=loop, eval={"at_start": True, "at_end": True, "sampling": {"max_tokens": 8}}
    )
    train_to_the_end(
        config,
        "eval.at_start=false",
        "eval.at_end=false",
        num_ranks=1,
        run_dir=tmp_path / "recorded",
        engine=served_engine,
    )
    rollouts = tmp_path / "recorded" / "rollouts"
    train_to_the_end(
        config,
        f"eval.fixed_rollouts={rollouts}",
        "eval.num_fixed_rollouts=12",
        num_ranks=1,
        run_dir=tmp_path / "run",
        engine=served_engine,
    )
    before, after = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    print({key: (before[key], after[key]) for key in before if key.startswith("eval/fixed")})
    for line in (before, after):
        assert 0 < line["eval/fixed_gap/max"] <= BOUND
        assert line["eval/fixed_gap/mean"] <= line["eval/fixed_gap/max"]
    # The set was sampled from the initial weights, of which both runs start; then they moved.
    groups = [each.group for each in read_step(rollouts, 1)]
    first = [rollout for group in groups for rollout in group.rollouts][:12]
    recorded = [each for r in first for each, kept in zip(r.rollout_logprobs, r.loss_mask) if kept]
    mean = sum(recorded) / len(recorded)
    assert abs(before["eval/fixed_logprob/mean"] - mean) < 1e-5
    assert abs(after["eval/fixed_logprob/mean"] - mean) > 1e-3
