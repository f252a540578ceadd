"""What torch reports as allocated in updates of small models, by component, beside their plans.

    python -m tests.plan.support.measured_memory OUT

Writes `OUT/measured.json`: for each configuration the bytes of weights, gradients, optimizer state,
activations and logits, measured and planned.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.config import (
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_rl.config.choices import ActivationRecomputation, DType
from megatron_rl.learner import learner as learner_module
from megatron_rl.learner.batch.packing import pack
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.optimizer_parts import chained_optimizers
from megatron_rl.learner.passes.forward import LossTerms, RowOutput
from megatron_rl.plan.layout import layout_of
from megatron_rl.plan.memory import learner_memory
from megatron_rl.records import MicroBatch, Rollout, Sample
from megatron_rl.weights.geometry import read_geometry

NUM_SEQUENCES = 4
MARK = 1_000_003  # bytes of an allocation that marks a moment


@dataclass(frozen=True, kw_only=True)
class Case:
    """Example: Case(model={"model_type": "llama"}, dtype="float32", tokens=512)."""

    model: dict[str, Any]  # of config.json
    dtype: DType
    tokens: int  # of the row
    is_distributed: bool = False
    recomputation: ActivationRecomputation = "none"


SIZES = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
CASES = {
    "qwen3_bfloat16": Case(
        model=SIZES
        | {"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 192, "vocab_size": 1024}
        | {"intermediate_size": 512, "tie_word_embeddings": False},
        dtype="bfloat16",
        tokens=512,
        is_distributed=True,
    ),
    "qwen3_tied_float32": Case(
        model=SIZES
        | {"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 256, "vocab_size": 4096}
        | {"intermediate_size": 384, "tie_word_embeddings": True},
        dtype="float32",
        tokens=384,
    ),
    "qwen3_selective": Case(
        model=SIZES
        | {"model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 128, "vocab_size": 2048}
        | {"intermediate_size": 512, "tie_word_embeddings": True},
        dtype="bfloat16",
        tokens=512,
        recomputation="selective",
    ),
    "llama_full": Case(
        model=SIZES
        | {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 128, "vocab_size": 2048}
        | {"intermediate_size": 512, "tie_word_embeddings": True},
        dtype="float32",
        tokens=512,
        recomputation="full",
    ),
    "llama_float32": Case(
        model=SIZES
        | {"model_type": "llama", "num_hidden_layers": 5, "hidden_size": 128, "vocab_size": 256}
        | {"intermediate_size": 640, "tie_word_embeddings": False},
        dtype="float32",
        tokens=512,
    ),
    "qwen3_moe_float32": Case(
        model=SIZES
        | {"model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 128}
        | {"vocab_size": 512, "intermediate_size": 512, "tie_word_embeddings": False}
        | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
        | {"norm_topk_prob": True},
        dtype="float32",
        tokens=512,
    ),
}


def measure(case: Case, folder: Path, parallel: Parallel) -> dict[str, dict[str, float]]:
    """The bytes of every component, as planned and as measured."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.model))
    model.to(torch.float32).save_pretrained(folder)
    geometry = read_geometry(folder)
    config = _config(case, folder)
    trained = Learner(config.model, config.learner.optimizer, geometry, parallel, num_updates=2)
    layout = layout_of(config, num_nodes=1, gpus_per_node=1)
    _, planned = learner_memory(config, geometry, layout, device="cpu")
    of_peak = planned.logits + planned.backward
    planned = replace(planned, logits=of_peak)
    return {"planned": asdict(planned), "measured": _resident(trained) | _peak(trained, case)}


def _config(case: Case, folder: Path) -> Config:
    length = case.tokens // NUM_SEQUENCES
    return Config(
        model=ModelConfig(
            path=str(folder), dtype=case.dtype, activation_recomputation=case.recomputation
        ),
        data=DataConfig(max_prompt_tokens=length // 2),
        rollout=RolloutConfig(sampling=SamplingConfig(max_tokens=length // 2)),
        learner=LearnerConfig(
            tokens_per_micro_batch=case.tokens,
            optimizer=OptimizerConfig(distributed=case.is_distributed),
        ),
    )


def _resident(learner: Learner) -> dict[str, float]:
    parameters = [each for part in learner.trained.parts for each in part.parameters()]
    state, main = [], []
    for part in chained_optimizers(learner.trained.optimizer):
        state += [each for of_one in part.optimizer.state.values() for each in of_one.values()]
        main += [each for group in part.optimizer.param_groups for each in group["params"]]
    of_model = {each.untyped_storage().data_ptr() for each in parameters}
    state += [each for each in main if each.untyped_storage().data_ptr() not in of_model]
    return {
        "weights": _storage_bytes(parameters),
        "gradients": _storage_bytes(each.main_grad for each in parameters),
        "optimizer": _storage_bytes(each for each in state if torch.is_tensor(each)),
    }


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> float:
    storages = (each.untyped_storage() for each in tensors)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _peak(learner: Learner, case: Case) -> dict[str, float]:
    """Activations: what is allocated when the logits are there, without them. Logits: what the peak
    of the update is above that, which is more than the logits if a layer is computed again.
    """
    rows = _rows(case)
    original = learner_module.row_output
    num_logits = 0

    def marked(logits: torch.Tensor, *positional: Any, **keywords: Any) -> RowOutput:
        nonlocal num_logits
        num_logits = logits.numel() * logits.element_size()
        torch.empty(MARK, dtype=torch.uint8)
        return original(logits, *positional, **keywords)

    learner_module.row_output = marked
    learner.update(rows, _loss)  # creates what later updates reuse
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.update(rows, _loss)
    learner_module.row_output = original
    total, peak, activations = 0, 0, 0
    events = profiler.profiler.kineto_results.events()
    memory = ((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    for _, change in sorted(memory, key=lambda pair: pair[0]):
        if change == MARK:
            activations = total - num_logits
        total += change
        peak = max(peak, total)
    return {"activations": activations, "logits": peak - activations}


def _loss(index: int, output: RowOutput) -> LossTerms:
    count = torch.tensor(output.logprobs.numel(), dtype=torch.int32)
    return LossTerms(total=-output.logprobs.sum(), count=count, num_kept=int(count), result=None)


def _rows(case: Case) -> list[MicroBatch]:
    length = case.tokens // NUM_SEQUENCES
    rollout = Rollout(
        token_ids=tuple(3 + place % 200 for place in range(length)),
        loss_mask=(False, *(True,) * (length - 1)),
        rollout_logprobs=(0.0,) * length,
        weight_versions=(-1, *(0,) * (length - 1)),
        finish_reason="stop",
        text="",
    )
    samples = [
        Sample(prompt_index=0, sample_index=number, rollout=rollout, reward=0.0, advantage=1.0)
        for number in range(NUM_SEQUENCES)
    ]
    [row] = pack(samples, tokens_per_row=case.tokens)
    return [row]


def main(out: Path) -> None:
    parallel = initialize_parallel(ParallelConfig(timeout_seconds=60), seed=0)
    found = {name: measure(case, out / name, parallel) for name, case in CASES.items()}
    (out / "measured.json").write_text(json.dumps(found))
    shut_down_parallel()


if __name__ == "__main__":
    from megatron_rl.learner.layout.cpu_device import run_on_cpu

    run_on_cpu()
    main(Path(sys.argv[1]))
