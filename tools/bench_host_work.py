"""Measures the host's work of one step by station, without engine and model.

    NPROC=2 launch/torchrun.sh tools.bench_host_work [--samples 512] [--tokens 8192]

The ranks are one replica (TP=2, or as many as there are ranks). Its head makes `samples` answers of
`tokens` tokens each, in the form in which an engine sends them, and takes them through the
functions of a real step. Printed are CPU seconds, which hardly depend on what else the machine
does, of all ranks together:

    parse    JSON of the engine's answers to rollouts
    judge    advantages
    check    the weight version of every token, and that every log-prob is one
    deal     samples to rows on every rank: pickled, broadcast, packed
    record   rollouts and recomputed log-probs to files
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.engine.answers import read_completion
from megatron_rl.learner.batch.deal import by_sample, deal_batch
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.loop.collect import judge
from megatron_rl.objective.discrepancy import check_logprobs
from megatron_rl.records import (
    Prompt,
    RecomputedRow,
    Rollout,
    RolloutGroup,
    SampledStep,
    Score,
    ScoredGroup,
)
from megatron_rl.rollout.episode import Episode
from megatron_rl.rollout.live import check_versions
from megatron_rl.rollout.recording import write_recomputed, write_step

GROUP_SIZE, NUM_PROMPT_TOKENS, VOCAB_SIZE, VERSION = 8, 200, 151_936, 3


class Stations:
    """CPU seconds by station, on this rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the CPU seconds of a block."""
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def answer(num_tokens: int, seed: int) -> str:
    """The JSON of one sample, as vLLM writes it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
    logprobs = (-torch.rand(num_tokens, generator=generator)).tolist()
    content = [
        {"token_id": token, "logprob": logprob, "top_logprobs": []}
        for token, logprob in zip(ids, logprobs, strict=True)
    ]
    versions = [{"version": str(VERSION), "start": 0, "end": num_tokens}]
    choice = {"token_ids": ids, "logprobs": {"content": content}, "weight_versions": versions}
    return json.dumps(choice | {"finish_reason": "length"})


def rollout_of(choice: dict[str, Any], prompt: Prompt) -> Rollout:
    """What `rollout/single_turn.py` makes of an answer."""
    episode = Episode()
    episode.say(prompt.token_ids)
    episode.sampled(read_completion(choice, "http://127.0.0.1:1", "answer"))
    return episode.rollout(finish_reason="length", text="")


def groups_of(num_samples: int, num_tokens: int, stations: Stations) -> tuple[ScoredGroup, ...]:
    """The groups of a step, each with as many right answers as wrong ones."""
    groups = []
    for index in range(num_samples // GROUP_SIZE):
        ids = tuple(range(3, 3 + NUM_PROMPT_TOKENS))
        prompt = Prompt(index=index, source="bench", text="", token_ids=ids, answer="")
        rollouts = []
        for number in range(GROUP_SIZE):
            text = answer(num_tokens, GROUP_SIZE * index + number)
            with stations.time("parse"):
                rollouts.append(rollout_of(json.loads(text), prompt))
        scores = tuple(
            Score(reward=float(number % 2), is_formatted=True, failure=None)
            for number in range(GROUP_SIZE)
        )
        group = RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))
        groups.append(ScoredGroup(group=group, scores=scores))
    return tuple(groups)


def run(num_samples: int, num_tokens: int) -> None:
    """One step; rank 0 prints the table."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    parallel = initialize_parallel(ParallelConfig(tensor=num_ranks), seed=0)
    stations = Stations()
    config = Config()
    judged = ()
    if parallel.is_replica_head:
        scored = groups_of(num_samples, num_tokens, stations)
        with stations.time("judge"):
            judged = tuple(judge(each, config) for each in scored)
        with stations.time("check"):
            check_versions([each.group for each in judged], VERSION)
    parallel.barrier()
    sampled = SampledStep(groups=judged, num_prompts=len(judged), num_rounds=1)
    with stations.time("deal"):
        batch = deal_batch(
            sampled.samples(),
            parallel,
            samples_per_prompt=GROUP_SIZE,
            num_mini_batches=4,
            tokens_per_row=2 * (NUM_PROMPT_TOKENS + num_tokens),
        )
    rows = [row for rows in batch.mini_batches for row in rows]
    with stations.time("check"):
        for row in rows:
            check_logprobs(row.rollout_logprobs, row.loss_mask, name="rollout log-prob")
    with stations.time("record"), tempfile.TemporaryDirectory() as folder:
        record(Path(folder), sampled, rows, parallel.is_replica_head)
    gathered: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(gathered, stations.seconds)
    if parallel.rank == 0:
        names = list(stations.seconds)
        of_all = {name: sum(each.get(name, 0.0) for each in gathered) for name in names}
        print(f"{num_samples} samples x {num_tokens} tokens, {num_ranks} ranks: CPU seconds")
        for name, seconds in of_all.items():
            print(f"  {name:8} {seconds:7.2f}")
        total = sum(seconds for name, seconds in of_all.items() if name != "parse")
        print(f"  all but parse {total:.2f}")
    shut_down_parallel()


def record(folder: Path, sampled: SampledStep, rows: list[Any], is_head: bool) -> None:
    """What `loop/record.py` writes."""
    if not is_head:
        return
    write_step(folder, 1, 0, sampled.groups, num_ranks=1)
    known = [
        RecomputedRow(
            micro_batch=row,
            recomputed_logprobs=row.rollout_logprobs,
            is_outside_support=torch.zeros_like(row.loss_mask),
        )
        for row in rows
    ]
    found = by_sample(known)
    write_recomputed(
        folder,
        1,
        0,
        prompt_index=[sample.prompt_index for sample, _ in found],
        sample_index=[sample.sample_index for sample, _ in found],
        lengths=[len(logprobs) for _, logprobs in found],
        recomputed_logprobs=torch.cat([logprobs for _, logprobs in found]),
    )


def main(arguments: list[str]) -> int:
    """Parse the command line and measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="of each sample")
    options = parser.parse_args(arguments)
    run(options.samples, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
