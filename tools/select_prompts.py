"""Writes the prompts that a model sometimes solves and sometimes does not to a JSONL file.

    python -m megatron_rl.evaluate CONFIG data.num_held_out=2000 eval.sampling.temperature=1
    python -m tools.select_prompts RUN_DIR/evaluations/0001 -o prompts.jsonl

A group whose responses all have the same reward has no advantage, and teaches nothing. The tool
reads the samples of an evaluation, or of the last one of a run, and keeps the prompts whose mean
reward is within two bounds, by default all between 0 and 1. Each line has the columns `question`
(the prompt as it was sampled, without a chat template), `answer`, `mean_reward` and `num_samples`;
so `data.tasks[].path` can name the file, with a verifier that needs no more than the answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.process.tool import run_tool
from megatron_rl.rollout.recording import read_samples
from tools.inspect_rollouts import last_step, samples_folder

Line = dict[str, Any]  # of a file of samples, or of the written one


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="of an evaluation, or of a run")
    parser.add_argument("--set", default="", help="an evaluation set; default: held-out prompts")
    parser.add_argument("--lowest", type=float, help="mean reward; default: all above 0")
    parser.add_argument("--highest", type=float, help="mean reward; default: all below 1")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new JSONL file")
    options = parser.parse_args(arguments)
    return run_tool("select_prompts", lambda: _select(options))


def _select(options: argparse.Namespace) -> None:
    if options.output.exists():
        raise ConfigError(f"--output: expected a new file, {options.output} exists")
    folder = samples_folder(options.run_dir, options.set)
    prompts = by_prompt(read_samples(folder, last_step(folder)))
    kept = within(prompts, options.lowest, options.highest)
    if not kept:
        raise DataError(
            f"{folder}: expected prompts with a mean reward within the bounds, got none of "
            f"{len(prompts)}; change --lowest and --highest, or evaluate on other prompts"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(each) + "\n" for each in kept))
    below = sum(each["mean_reward"] <= 0 for each in prompts)
    above = sum(each["mean_reward"] >= 1 for each in prompts)
    print(
        f"{options.output}: {len(kept)} of {len(prompts)} prompts "
        f"({below} are never solved, {above} always)"
    )


def by_prompt(samples: Iterable[Line]) -> list[Line]:
    """One line for each text of a prompt, in the order of the samples.

    Args:
        samples: lines of a file of samples; those that could not be scored do not count.
    """
    rewards: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        if sample["failure"] is None:
            rewards.setdefault((sample["prompt"], sample["answer"]), []).append(sample["reward"])
    return [
        {
            "question": prompt,
            "answer": answer,
            "mean_reward": statistics.fmean(found),
            "num_samples": len(found),
        }
        for (prompt, answer), found in rewards.items()
    ]


def within(prompts: Sequence[Line], lowest: float | None, highest: float | None) -> list[Line]:
    """The prompts whose mean reward is at least `lowest` and at most `highest`; None: above 0, and
    below 1.
    """

    def is_within(mean: float) -> bool:
        is_above = mean > 0 if lowest is None else mean >= lowest
        return is_above and (mean < 1 if highest is None else mean <= highest)

    return [each for each in prompts if is_within(each["mean_reward"])]


if __name__ == "__main__":
    sys.exit(main())
