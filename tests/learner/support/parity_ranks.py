"""What the ranks of the parity tests do: every model in every layout of this world size.

    torchrun --nproc_per_node N -m tests.learner.support.parity_ranks FOLDER

Megatron's groups are taken down and made anew between layouts, so that one start serves them all.
Rank 0 writes `FOLDER/<model>.<case>.pt`: the learner's log-probs by sequence, the exported weights
before and after one recorded training step, its gradients under Hugging Face names, and a digest of
every shard, by which copies are compared; and `FOLDER/parallel.<case>.pt`: every rank's place.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import ModelConfig, ObjectiveConfig, OptimizerConfig
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.batch.deal import split_by_sample
from megatron_rl.learner.batch.packing import deal, fill, pack
from megatron_rl.learner.layout.cpu_device import run_on_cpu
from megatron_rl.learner.layout.parallel import Parallel, initialize_parallel, shut_down_parallel
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.build import build_model, held_parameters, tensor_place
from megatron_rl.learner.model.optimizer_parts import chained_optimizers
from megatron_rl.learner.passes.forward import RowOutput, row_output, run_schedule
from megatron_rl.learner.update.step import train_step
from megatron_rl.objective.constraint import DualVariable
from megatron_rl.records import MicroBatch, Rollout, Sample, TrainBatch
from megatron_rl.weights.geometry import read_geometry
from tests.learner.support.exported import exported_gradients, exported_weights
from tests.learner.support.parity_cases import BFLOAT16_CASES, CASES, MOE_CASES, Case
from tests.learner.support.parity_models import COOL, DUAL_VALUE, MODELS
from tests.support.listeners import listening_addresses

TOKENS_PER_ROW = 384
LEARNING_RATE = 1e-3
# Adam's first step is about the gradient's sign; with its usual 1e-8 the sign of rounding errors
# would step as far as any other.
EPSILON = 1e-5


def recorded_samples(batch: dict[str, Any], *, is_every_token_kept: bool) -> list[Sample]:
    """The recorded batch as the loop would hand it over."""
    samples = []
    for number, sequence in enumerate(batch["sequences"]):
        length = len(sequence)
        prompt_length = 1 if is_every_token_kept else batch["prompt_lengths"][number]
        rollout = Rollout(
            token_ids=tuple(sequence.tolist()),
            loss_mask=tuple(position >= prompt_length for position in range(length)),
            rollout_logprobs=tuple(batch["rollout_logprobs"][number].tolist()),
            weight_versions=tuple(0 if at >= prompt_length else -1 for at in range(length)),
            finish_reason="stop",
            text="",
        )
        samples.append(
            Sample(
                prompt_index=number,
                sample_index=0,
                rollout=rollout,
                reward=0.0,
                advantage=batch["advantages"][number],
            )
        )
    return samples


def rows_of_rank(samples: list[Sample], case: Case, parallel: Parallel) -> list[MicroBatch]:
    """This rank's rows, filled up to as many as any rank has."""
    shares = deal([len(sample.rollout.token_ids) for sample in samples], parallel.dp_size)
    packed = []
    for share in shares:
        mine = [samples[index] for index in share]
        in_one_row = [mine] if case.is_packed else [[sample] for sample in mine]
        packed.append(
            [
                row
                for each in in_one_row
                for row in pack(
                    each,
                    tokens_per_row=TOKENS_PER_ROW,
                    min_size=TOKENS_PER_ROW,
                    multiple=case.layout.row_multiple,
                    sequence_multiple=case.layout.sequence_multiple,
                )
            ]
        )
    group = case.layout.rows_per_group
    num_rows = -(-max(len(rows) for rows in packed) // group) * group
    return fill(packed[parallel.dp_rank], num_rows, TOKENS_PER_ROW)


def by_sequence(rows: list[MicroBatch], values: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The values [T] of rows by sequence, [L-1]; nothing before the last stage."""
    return {
        sample.prompt_index: of_tokens[1:].clone()
        for row, of_row in zip(rows, values)
        for sample, of_tokens in split_by_sample(row, of_row)
    }


def forward_at(learner: Learner, rows: list[MicroBatch], temperature: float) -> list[RowOutput]:
    """A forward pass at another temperature, with the entropy."""

    def on_output(index: int, logits: torch.Tensor) -> RowOutput:
        return row_output(
            logits,
            rows[index],
            temperature=temperature,
            vocab_size=learner.geometry.vocab_size,
            parallel=learner.parallel,
        )

    with torch.no_grad():
        return run_schedule(
            learner.trained.parts, rows, on_output, parallel=learner.parallel, forward_only=True
        )


def shard_digests(learner: Learner, attribute: str) -> list[tuple[str, int | None, str]]:
    """(Hugging Face name, TP or ETP rank or None for a copy, digest) of this rank's shards."""
    digests = []
    modules = learner.trained.modules
    for rule, parameter in held_parameters(learner.geometry, learner.parallel, modules):
        tensor = getattr(parameter, attribute).detach().float().contiguous()
        digest = hashlib.sha1(tensor.numpy().tobytes()).hexdigest()
        rank = None if rule.kind == "replicated" else tensor_place(rule, learner.parallel)[0]
        digests.append((rule.hf_names[0], rank, digest))
    return digests


def main_weights(learner: Learner) -> dict[str, Any]:
    """Of the optimizer: the dtypes that it steps, its state, and how far main weights have come."""
    groups = learner.trained.optimizer.param_groups
    states = [
        state
        for part in chained_optimizers(learner.trained.optimizer)
        for state in part.optimizer.state.values()
    ]
    found: dict[str, Any] = {
        "dtypes": {str(parameter.dtype) for group in groups for parameter in group["params"]},
        "state": {key for state in states for key in state},
        "state_dtypes": {str(value.dtype) for state in states for value in state.values()},
        "is_rounded_main": True,
    }
    for part in learner.trained.parts:
        for parameter in part.parameters():
            main = getattr(parameter, "main_param", None)
            if main is not None and main.shape == parameter.shape:
                found["is_rounded_main"] &= torch.equal(parameter, main.to(parameter.dtype))
    return found


def train_once(learner: Learner, rows: list[MicroBatch]) -> tuple[dict[str, float], bool]:
    """One recorded step; its metrics, and whether the log-probs that it trained on were bit for bit
    what a forward-only pass had given.
    """
    recomputed = learner.recompute(rows)
    report, trained_on = train_step(
        learner,
        TrainBatch(mini_batches=(tuple(rows),), num_left_out=(0,), dropped=()),
        DualVariable(
            value=DUAL_VALUE, learning_rate=1.0, tolerance=0.0037, minimum=0.0, maximum=10.0
        ),
        ObjectiveConfig(normalize="token_mean"),  # as in parity_models.py
        step=1,
        weight_version=0,
        should_recompute=False,
    )
    is_same = [
        torch.equal(separate.recomputed_logprobs, saved.recomputed_logprobs)
        for separate, saved in zip(recomputed, trained_on, strict=True)
    ]
    return report.metrics, all(is_same)


@contextmanager
def counted_layers(learner: Learner) -> Iterator[Counter[str]]:
    """How often the first layer on this rank, its attention and its MLP run in the meantime."""
    calls: Counter[str] = Counter()
    layer = learner.trained.modules[0].decoder.layers[0]
    mlp = getattr(layer.mlp, "router", layer.mlp)  # an MoE layer runs its own parts again
    watched = {"attention": layer.self_attention.core_attention, "mlp": mlp, "layer": layer}

    def counting(name: str) -> Any:
        return lambda *_: calls.update([name])

    hooks = [module.register_forward_hook(counting(name)) for name, module in watched.items()]
    yield calls
    for hook in hooks:
        hook.remove()


def scored_by_every_replica(
    learner: Learner, samples: list[Sample]
) -> list[dict[int, torch.Tensor]]:
    """Of every rank what `score_samples` gave it of samples that rank 0 alone holds, [L-1]."""
    held = samples if learner.parallel.rank == 0 else []
    scored = learner.score_samples(held, tokens_per_row=TOKENS_PER_ROW)
    own = {sample.prompt_index: values[1:].clone() for sample, values in scored}
    of_ranks: list[Any] = [None] * learner.parallel.world_size
    dist.all_gather_object(of_ranks, own)
    return of_ranks


def place_among_experts(learner: Learner) -> dict[str, Any]:
    """Which experts this rank holds, and which rank it takes for the one that exports them."""
    parallel, experts = learner.parallel, learner.geometry.experts
    place = parallel.ep_group.rank(), parallel.etp_group.rank()
    return {
        "rank": parallel.rank,
        "place": (*place, parallel.edp_group.rank()),
        "own": list(parallel.own_experts(experts.num_experts if experts else 0)),
        "is_exported": parallel.holds_exported_experts,
        "holder": parallel.expert_holder(*place, parallel.pp_rank),
    }


def run_case(folder: Path, model_name: str, case: Case, parallel: Parallel) -> dict[str, Any]:
    """One model in one layout: recompute, export, one recorded step, export again."""
    batch = torch.load(folder / f"{model_name}.pt")
    path = folder / model_name
    learner = Learner(
        ModelConfig(path=str(path), dtype=case.dtype, activation_recomputation=case.recomputation),
        OptimizerConfig(
            learning_rate=LEARNING_RATE, epsilon=EPSILON, distributed=case.is_distributed
        ),
        read_geometry(path),
        parallel,
        num_updates=1,
    )
    outcome: dict[str, Any] = {"names": learner.tensor_shapes()}
    every_token = recorded_samples(batch, is_every_token_kept=True)
    rows = rows_of_rank(every_token, case, parallel)
    cool = forward_at(learner, rows, COOL)
    recomputed = [row.recomputed_logprobs for row in learner.recompute(rows)]
    full = [row.full_logprobs for row in learner.full_logprobs(rows)]
    forward = {
        "logprobs": by_sequence(rows, recomputed),
        "full_logprobs": by_sequence(rows, full),
        "cool_logprobs": by_sequence(rows, [row.logprobs for row in cool]),
        "cool_entropy": by_sequence(rows, [row.entropy for row in cool]),
    }
    outcome["scored"] = scored_by_every_replica(learner, every_token)
    outcome["weights_before"] = exported_weights(learner)
    recorded = recorded_samples(batch, is_every_token_kept=False)
    rows = rows_of_rank(recorded, case, parallel)
    with counted_layers(learner) as calls:
        outcome["metrics"], is_same = train_once(learner, rows)
    outcome["calls_of_a_row"] = {name: count / len(rows) for name, count in calls.items()}
    digests = {"weights": shard_digests(learner, "data")}
    if not case.is_distributed:
        outcome["gradients"] = exported_gradients(learner)
        digests["gradients"] = shard_digests(learner, "main_grad")
    outcome["weights_after"] = exported_weights(learner)
    outcome["main"] = main_weights(learner)
    of_ranks: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(of_ranks, (forward, digests, is_same, place_among_experts(learner)))
    names = ("forward", "digests", "is_same", "experts")
    outcome |= dict(zip(names, zip(*of_ranks), strict=True))
    return outcome


def place_of(parallel: Parallel) -> dict[str, Any]:
    """What this rank's `Parallel` says, and what its exchanges give."""
    reduce = parallel.batch_reducer()
    ranks = torch.tensor([float(parallel.rank)], dtype=torch.float64)
    return {
        "place": (parallel.tp_rank, parallel.pp_rank, parallel.dp_rank),
        "size": (parallel.tp_size, parallel.pp_size, parallel.dp_size),
        "ends": (parallel.is_first_stage, parallel.is_last_stage, parallel.is_replica_head),
        "row_head": parallel.is_row_head,
        "replica_head": parallel.from_replica_head(parallel.rank),
        "last_stage": parallel.from_last_stage(parallel.rank),
        "reduced": [reduce(ranks.clone(), name).item() for name in ("sum", "max")],
        "listens_on": listening_addresses(os.getpid()),
    }


def refusals(folder: Path, parallel: Parallel) -> dict[str, tuple[str, str]]:
    """Name of a broken checkpoint -> the error's type and text."""
    found = {}
    for path in sorted(folder.iterdir()):
        try:
            build_model(
                ModelConfig(path=str(path)),
                read_geometry(path),
                parallel,
                OptimizerConfig(),
            )
        except (ConfigError, DataError) as error:
            found[path.name] = (type(error).__name__, str(error))
    return found


def main(folder: Path) -> None:
    run_on_cpu()
    from megatron.core import parallel_state

    world_size = int(os.environ["WORLD_SIZE"])
    for case in (*CASES, *BFLOAT16_CASES, *MOE_CASES):
        if case.world_size != world_size:
            continue
        parallel = initialize_parallel(case.layout, seed=1)
        places: list[Any] = [None] * world_size
        dist.all_gather_object(places, place_of(parallel))
        outcomes = {f"parallel.{case.name}": places}
        for name in case.models or MODELS:
            outcomes[f"{name}.{case.name}"] = run_case(folder, name, case, parallel)
        if case.name == "tp1" and not case.models:
            outcomes["refusals.tp1"] = refusals(folder / "broken", parallel)
        if parallel.rank == 0:
            for name, outcome in outcomes.items():
                torch.save(outcome, folder / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    shut_down_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
