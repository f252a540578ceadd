"""Measures the gap between the learner and an engine that serves another checkpoint of its model,
such as a quantised one (tools/quantize_checkpoint.py).

    python tools/checkpoint_gap.py configs/quickstart.yaml --checkpoint /models/int4 \\
        run_dir=runs/gap

Starts one engine from the checkpoint, samples the prompts of one step from the whole distribution,
and computes the learner's log-probs of the same tokens at `model.path`, in one process, whatever
layout the config has. Nothing is trained, and no weights are sent. Writes `<run_dir>/rollouts` as a
run does for its first step, and prints the mean and the largest |p_train - p_inf|:
tools/explain_discrepancy.py --checkpoint compares several checkpoints.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.data.end_tokens import end_tokens
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.server import start_engines
from megatron_rl.errors import ConfigError
from megatron_rl.learner.batch.deal import unscored_samples
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.loop.preflight import prepare_data
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.process.command import Progress, run_command
from megatron_rl.process.lifetime import register_cleanup
from megatron_rl.records import RolloutGroup, Sample, Score, ScoredGroup
from megatron_rl.rollout.live import sample_groups
from megatron_rl.rollout.recording import write_recomputed, write_step
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.rollout.single_turn import SingleTurn
from megatron_rl.weights.geometry import Geometry

STEP = 1
UNSCORED = Score(reward=0.0, is_formatted=False, failure=None)


def main(argv: list[str]) -> int:
    """Parse the option of this command, and leave the rest to `run_command`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--checkpoint", type=Path)
    options, rest = parser.parse_known_args(argv)
    return run_command(
        "The gap of an engine with another checkpoint. Also: --checkpoint FOLDER (required).",
        partial(measure, checkpoint=options.checkpoint),
        rest,
        folder_of=lambda config: Path(config.run_dir),
    )


def measure(config: Config, _progress: Progress, *, checkpoint: Path | None) -> None:
    """Sample, compute, write and print; see the docstring of this module.

    Raises:
        ConfigError: there is no checkpoint.
        EngineError: the engine does not load the checkpoint.
    """
    if checkpoint is None or not (checkpoint / "config.json").is_file():
        raise ConfigError(f"--checkpoint: expected a folder with config.json, got {checkpoint}")
    config = replace(config, parallel=ParallelConfig())  # one rank
    geometry, tokenizer, stream = prepare_data(config)
    prompts = stream.prompts(0, config.loop.prompts_per_step)
    environment = SingleTurn(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    rollout = replace(config.rollout, num_engines=1)
    [engine] = start_engines(
        rollout,
        model_path=str(checkpoint),
        log_dir=Path(config.run_dir) / "logs",
        token=secrets.token_urlsafe(32),
        seed=config.loop.seed,
        update_timeout_seconds=config.sync.timeout_seconds,
    )
    register_cleanup(engine.stop)
    with engine:
        engine.wait_ready()
        ends = end_tokens(config.model.path, tokenizer, geometry.vocab_size)
        pool = HttpEnginePool([engine.address], rollout, end_token_ids=ends, check=engine.check)
        groups = sample_groups(
            pool,
            environment,
            prompts,
            replace(rollout.sampling, top_k=0, top_p=1.0, min_p=0.0),
            num_samples=config.loop.samples_per_prompt,
            seeds=[sampling_seed(config.loop.seed, STEP, prompt.index) for prompt in prompts],
        )
    pairs = _learned(config, geometry, groups)
    _write(Path(config.run_dir) / "rollouts", groups, pairs)
    gaps = torch.cat(
        [
            discrepancy(learned.double(), torch.from_numpy(sample.rollout.rollout_logprobs))[
                torch.from_numpy(sample.rollout.loss_mask)
            ]
            for sample, learned in pairs
        ]
    )
    figures = {"mean": float(gaps.mean()), "largest": float(gaps.max())}
    print(json.dumps({"checkpoint": str(checkpoint), **figures, "num_tokens": gaps.numel()}))


def _learned(
    config: Config, geometry: Geometry, groups: list[RolloutGroup]
) -> list[tuple[Sample, torch.Tensor]]:
    parallel = initialize_parallel(config.parallel, seed=config.loop.seed)
    learner = Learner(config.model, config.learner.optimizer, geometry, parallel, num_updates=1)
    tokens_per_row = config.learner.tokens_per_micro_batch
    pairs = learner.score_samples(unscored_samples(groups), tokens_per_row=tokens_per_row)
    shut_down_parallel()
    return pairs


def _write(
    folder: Path, groups: list[RolloutGroup], pairs: list[tuple[Sample, torch.Tensor]]
) -> None:
    judged = [
        ScoredGroup(group=group, scores=(UNSCORED,) * len(group.rollouts)).without_judgement()
        for group in groups
    ]
    write_step(folder, STEP, 0, judged, num_ranks=1)
    write_recomputed(
        folder,
        STEP,
        0,
        prompt_index=[sample.prompt_index for sample, _ in pairs],
        sample_index=[sample.sample_index for sample, _ in pairs],
        lengths=[len(learned) for _, learned in pairs],
        recomputed_logprobs=torch.cat([learned for _, learned in pairs]),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
