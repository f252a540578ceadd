"""The warm start through the command line: the loss falls, the checkpoint is one that transformers
loads, and what is held out stays unseen.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_rl.config import Config, ModelConfig, WarmStartConfig
from megatron_rl.config.file import load_config
from megatron_rl.config.learner import MoeConfig
from megatron_rl.data.pairs import PairStream
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import ConfigError
from megatron_rl.learner.batch.packing import pack
from megatron_rl.learner.model.routing import BalanceScales
from megatron_rl.process.command import Progress
from megatron_rl.sft import as_samples, learn, warm_start
from tests.support.models import write_tiny_experts
from tests.support.ranks import rank_environment, run_module

NUM_STEPS, SEQUENCES_PER_STEP = 30, 32
NUM_HELD_OUT = 20
TASK = {
    "name": "chain_sum",
    "prompt_column": "metadata.expression",
    "verifier": "exact",
    "template": "{prompt}=",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}

# Mean negative log-prob of the answers to the questions under each of some models, by transformers,
# in a process of its own: the learner's changes to torch would reach it otherwise.
SCORE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
pairs = json.load(open(sys.argv[1]))
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total = count = 0.0
    for prompt, response in pairs:
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        for position, token in enumerate(response, start=len(prompt) - 1):
            total, count = total - logits[position, token].item(), count + 1
    print(total / count)
"""


@pytest.fixture(scope="module")
def run_dir(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a warm start on one-digit sums with two ranks."""
    folder = tmp_path_factory.mktemp("sft")
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(tiny_checkpoint)},
        "data": {
            "tasks": [TASK],
            "num_held_out": NUM_HELD_OUT,
        },
        "rollout": {"sampling": {"max_tokens": 6}},
        "learner": {"tokens_per_micro_batch": 256},
        "warm_start": {
            "num_steps": NUM_STEPS,
            "sequences_per_step": SEQUENCES_PER_STEP,
            "learning_rate": 3e-3,
            "warmup_steps": 5,
            "log_every": 1,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    run_module("megatron_rl.sft", path, ranks=2)
    return folder / "run"


@pytest.fixture(scope="module")
def config(run_dir: Path) -> Config:
    return load_config(str(run_dir.parent / "config.yaml"), [])


def test_the_loss_falls(run_dir: Path) -> None:
    lines = (run_dir / "warm_start/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/mean"] for line in lines]
    assert len(losses) == NUM_STEPS
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_transformers_loads_what_was_learnt(
    run_dir: Path, config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stream = PairStream(config, load_tokenizer(str(tiny_checkpoint), 128))
    pairs = stream.pairs((NUM_STEPS - 1) * SEQUENCES_PER_STEP, SEQUENCES_PER_STEP)
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    after = run_dir / "warm_start/checkpoint"
    command = [sys.executable, "-W", "ignore", "-c", SCORE]
    finished = subprocess.run(
        [*command, str(tmp_path / "pairs.json"), str(tiny_checkpoint), str(after)],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    losses = dict(zip(("before", "after"), map(float, finished.stdout.splitlines()[-2:])))
    lines = (run_dir / "warm_start/metrics.jsonl").read_text().splitlines()
    assert losses["after"] < 0.6 * losses["before"]
    # The last step's pairs, before that step's update.
    assert losses["after"] == pytest.approx(json.loads(lines[-1])["loss/mean"], rel=0.1)


def test_no_pair_is_held_out(config: Config, tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_checkpoint), 128)
    held_out = PromptStream(config.data, tokenizer, 32).held_out()
    assert len(held_out) == NUM_HELD_OUT
    unseen = {prompt.token_ids for prompt in held_out}
    pairs = PairStream(config, tokenizer).pairs(0, NUM_STEPS * SEQUENCES_PER_STEP)
    seen = {prompt_ids for prompt_ids, _ in pairs}
    assert len(seen) > 80  # of the about 200 questions there are: held-out ones would be among them
    assert not seen & unseen


def test_only_the_response_is_learnt() -> None:
    (sample,) = as_samples([((1, 5, 6), (7, 2))], 11)
    assert sample.prompt_index == 11
    assert sample.rollout.token_ids.tolist() == [1, 5, 6, 7, 2]
    assert sample.rollout.loss_mask.tolist() == [False] * 3 + [True] * 2


def test_an_output_that_could_not_be_written_is_refused_before_a_step(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "checkpoint"
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint)),
        warm_start=WarmStartConfig(output=str(output)),
    )
    with pytest.raises(ConfigError, match=rf"warm_start\.output={output}: expected a folder"):
        warm_start(config, Progress())


def test_the_losses_that_balance_experts_are_means_over_the_batch() -> None:
    """Two sequences with 16 tokens, of which 12 are the count that Megatron divides by."""
    pairs = [((1, 5), (7,) * 8), ((1, 5), (9,) * 4)]
    rows = pack(as_samples(pairs, 0), tokens_per_row=64)
    given: dict[str, Any] = {}

    def update(rows: Any, row_loss: Any, *, balance: BalanceScales) -> tuple[list[Any], float]:
        given["balance"] = balance
        return [], 0.5

    learner: Any = SimpleNamespace(
        parallel=SimpleNamespace(
            is_last_stage=True,
            batch_reducer=lambda: lambda tensor, _operation: tensor,
            from_last_stage=lambda value: value,
        ),
        moe=MoeConfig(load_balancing_coefficient=0.1, z_loss_coefficient=0.01),
        update=update,
        learning_rate=1e-3,
        take_router_metrics=lambda: {"router/entropy/mean": 1.25},
    )
    metrics = learn(learner, rows)
    assert given["balance"].load_balancing == pytest.approx(0.1 * 12 / 2)
    assert given["balance"].z_loss == pytest.approx(0.01 * 12 / 16)
    assert metrics["router/entropy/mean"] == 1.25


def test_experts_are_balanced(tmp_path: Path) -> None:
    """The loss, which is 1 where they are, falls under a large coefficient."""
    write_tiny_experts(tmp_path / "model")
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"tasks": [TASK], "num_held_out": NUM_HELD_OUT},
        "rollout": {"sampling": {"max_tokens": 6}},
        "learner": {
            "tokens_per_micro_batch": 256,
            "moe": {"load_balancing_coefficient": 10.0, "routing_replay": "recomputed"},
        },
        "warm_start": {
            "num_steps": 8,
            "sequences_per_step": 16,
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "log_every": 1,
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    run_module("megatron_rl.sft", path, ranks=1)
    lines = (tmp_path / "run/warm_start/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["router/load_balancing_loss/mean"] for line in lines]
    assert losses[-1] - 1 < 0.5 * (losses[0] - 1), losses
