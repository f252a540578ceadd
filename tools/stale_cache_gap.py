"""Measures what a key-value cache of old weights does to the gap (sync.running_requests).

    python -m tools.stale_cache_gap --work DIR [key=value ...]

Trains the model of tools/bench_step.py, whose responses all have the same length, to write digits:
with rollout.max_policy_age=1, once with `keep` and once with `recompute`, and with an engine in
float32, so that there is no other gap. Of the tokens that the engine sampled by the learner's
weights, in responses that began under older ones, it prints the mean and the largest
|p_train - p_inf|: with `keep` their context is in the cache of the old weights. Beside it are the
mean of the older tokens, which is the gap of age, and the seconds of a publication (medians).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.errors import DataError
from megatron_rl.observe.console import SECONDS
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.process.tool import run_tool
from megatron_rl.rollout.recording import read_recomputed, read_step
from megatron_rl.study.runs import run_to_the_end
from tools.bench_step import SETTINGS, write_model

KINDS = ("keep", "recompute")
HEADER = "| running requests | tokens after an update | mean | largest | older, mean | sync, s |"
NUM_TOKENS = 192
OVERRIDES = (
    "rollout.max_policy_age=1",
    "rollout.keep_steps=0",
    "sync.probe_num_tokens=0",
    # few sequences: to sample them takes longer than to train on them, so that updates meet them
    "loop.num_steps=30",
    "loop.prompts_per_step=4",
    "loop.samples_per_prompt=4",
    "learner.optimizer.learning_rate=1.0e-3",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print a table; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    options = parser.parse_intermixed_args(argv)  # settings come after the options
    return run_tool("stale_cache_gap", lambda: _measure(options))


def share_of_digits(response: str, answer: str, metadata: dict[str, Any]) -> float:
    """The reward: the share of the response's characters that are digits."""
    return sum(map(str.isdigit, response)) / max(1, len(response))


def _measure(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    model, config = options.work / "model", options.work / "settings.yaml"
    if not model.exists():
        write_model(model)
    settings = SETTINGS.format(model=model, tokens=NUM_TOKENS, threads=1)
    reward = f"tools.stale_cache_gap:{share_of_digits.__name__}"
    config.write_text(settings.replace("verifier: exact", f"verifier: {reward}"))
    lines = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    for kind in KINDS:
        overrides = [*OVERRIDES, f"sync.running_requests={kind}", *options.overrides]
        run_dir = run_to_the_end(config, overrides, options.work / kind)
        after, older = gaps_of(run_dir)
        metrics = read_metrics(run_dir / "metrics.jsonl")
        sync = statistics.median(line[SECONDS + "sync"] for line in metrics)
        lines.append(
            f"| {kind} | {after.size:,} | {after.mean():.2g} | {after.max():.2g} "
            f"| {older.mean():.2g} | {sync:.2f} |"
        )
    print("\n".join(lines))


def gaps_of(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """|p_train - p_inf| in the responses that span an update, [N] float64 each: of the tokens of
    the learner's weights, and of the older ones.

    Raises:
        DataError: no response spans one.
    """
    after, older = [np.zeros(0)], [np.zeros(0)]
    for step in (line["step"] for line in read_metrics(run_dir / "metrics.jsonl")):
        recomputed = read_recomputed(run_dir / "rollouts", step)
        for scored in read_step(run_dir / "rollouts", step) if recomputed else ():
            for index, rollout in enumerate(scored.group.rollouts):
                learner = recomputed[scored.group.prompt.index, index].double().exp().numpy()
                delta = np.abs(learner - np.exp(rollout.rollout_logprobs))[rollout.loss_mask]
                is_new = rollout.weight_versions[rollout.loss_mask] == step - 1
                if is_new.any() and not is_new.all():
                    after.append(delta[is_new])
                    older.append(delta[~is_new])
    if len(after) == 1:
        raise DataError(
            f"{run_dir}: expected responses that span an update, got none; sample longer ones "
            "(rollout.sampling.max_tokens)"
        )
    return np.concatenate(after), np.concatenate(older)


if __name__ == "__main__":
    sys.exit(main())
