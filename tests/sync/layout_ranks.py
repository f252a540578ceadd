"""What the ranks of test_layouts.py do: in every layout of this world size, publish to the engine,
update the weights, and publish again.

    torchrun --nproc_per_node N -m tests.sync.layout_ranks MODEL URL OUT LAYOUT ...

The engine's token is in the environment. Rank 0 writes `OUT/<layout>.json`: of each publication how
many tokens the engine sampled, and by how much their log-probs differ from the learner's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
import torch

from megatron_rl.config import ModelConfig, OptimizerConfig, SyncConfig
from megatron_rl.config.rollout import QuantizationConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.learner.batch.deal import pack_rows
from megatron_rl.learner.layout.cpu_device import run_on_cpu
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.passes.forward import LossTerms, RowOutput
from megatron_rl.records import TOKEN_VARIABLE, Rollout, Sample
from megatron_rl.sync.probe import Precisions
from megatron_rl.sync.probe import compare as compare_logprobs
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import weight_stream
from megatron_rl.weights.geometry import read_geometry
from tests.support.layouts import EXPERT_LAYOUTS, LAYOUTS

TOKENS_PER_ROW = 128
NUM_SAMPLES, NUM_TOKENS = 4, 24
PROMPT = torch.randint(3, 128, (37,), generator=torch.Generator().manual_seed(0)).tolist()
# Adam's first step moves every weight by the learning rate: log-probs by about 0.1.
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)


def sampled(address: EngineAddress, version: int) -> list[Sample]:
    """What the engine answers to the prompt, with its log-probs."""
    sampling = {"n": NUM_SAMPLES, "temperature": 1.0, "max_tokens": NUM_TOKENS, "logprobs": 0}
    answer = httpx.post(
        f"{address.url}/inference/v1/generate",
        headers={"Authorization": f"Bearer {address.token}"},
        json={"token_ids": PROMPT, "sampling_params": sampling | {"ignore_eos": True, "seed": 1}},
        timeout=60.0,
        trust_env=False,
    )
    samples = []
    for index, choice in enumerate(answer.raise_for_status().json()["choices"]):
        assert {span["version"] for span in choice["weight_versions"]} == {str(version)}
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        before, after = len(PROMPT), len(choice["token_ids"])
        rollout = Rollout(
            token_ids=(*PROMPT, *choice["token_ids"]),
            loss_mask=(False,) * before + (True,) * after,
            rollout_logprobs=(0.0,) * before + tuple(logprobs),
            weight_versions=(-1,) * before + (version,) * after,
            finish_reason="length",
            text="",
        )
        samples.append(
            Sample(prompt_index=0, sample_index=index, rollout=rollout, reward=0.0, advantage=0.0)
        )
    return samples


def publish(learner: Learner, publisher: Publisher | None, version: int) -> None:
    """As the loop does."""
    if publisher is None:
        learner.give_tensors()
    else:
        stream = weight_stream(
            learner.tensor_shapes(),
            learner.full_tensors(),
            quantization=QuantizationConfig(),
            dtype=torch.float32,
        )
        publisher.publish(stream, version=version)
    learner.parallel.barrier()


def compare(learner: Learner, samples: list[Sample]) -> dict[str, float]:
    """The engine's log-probs of its samples beside the learner's; the same on every rank."""
    scored = learner.score_samples(samples, tokens_per_row=TOKENS_PER_ROW)
    found: dict[str, float] = {}
    if learner.parallel.is_last_stage:
        kept = [torch.as_tensor(sample.rollout.loss_mask) for sample, _ in scored]
        served = [torch.as_tensor(sample.rollout.rollout_logprobs) for sample, _ in scored]
        own = torch.cat([each[mask] for (_, each), mask in zip(scored, kept)])
        report = compare_logprobs(
            [each[mask] for each, mask in zip(served, kept)],
            [each[mask] for (_, each), mask in zip(scored, kept)],
            Precisions(engine="float32", learner="float32", tolerance=1.0),  # the test judges
        )
        found = {
            "num_tokens": report.num_tokens,
            "gap": report.max_relative_logprob_gap,
            "mean_logprob": float(own.mean()),
        }
    return learner.parallel.from_last_stage(found)


def learn(learner: Learner, samples: list[Sample]) -> None:
    """One optimizer step towards the samples."""
    samples = learner.parallel.from_first_rank(samples)
    rows = pack_rows(samples, learner.parallel, TOKENS_PER_ROW, min_rows=1)

    def loss(index: int, output: RowOutput) -> LossTerms:
        num_kept = int(rows[index].loss_mask.sum())
        return LossTerms(
            total=-output.logprobs.sum(),
            count=torch.tensor(num_kept, dtype=torch.int32),
            num_kept=num_kept,
            result=None,
        )

    _, norm = learner.update(rows, loss)
    assert norm is not None


def run_layout(
    model: Path, address: EngineAddress, parallel: Parallel, first_version: int
) -> list[dict[str, float]]:
    learner = Learner(
        ModelConfig(path=str(model)), OPTIMIZER, read_geometry(model), parallel, num_updates=1
    )
    publisher = None
    if parallel.rank == 0:
        publisher = Publisher([address], SyncConfig(bucket_mib=0.25), wire_dtype=None)
    found = []
    for version in (first_version, first_version + 1):
        publish(learner, publisher, version)
        samples = [] if publisher is None else sampled(address, version)
        found.append(compare(learner, samples))
        if version == first_version:
            learn(learner, samples)
    if publisher is not None:
        publisher.close()
    return found


def main(model: Path, url: str, out: Path, names: list[str]) -> None:
    run_on_cpu()
    from megatron.core import parallel_state

    address = EngineAddress(url=url, token=os.environ[TOKEN_VARIABLE])
    for number, name in enumerate(names):
        parallel = initialize_parallel((LAYOUTS | EXPERT_LAYOUTS)[name].config(), seed=0)
        found = run_layout(model, address, parallel, 100 + 2 * number)
        if parallel.rank == 0:
            (out / f"{name}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
