"""Says what a run will need on a cluster, before any GPU is held.

    python tools/plan.py configs/dapo.yaml --nodes 1 --gpus-per-node 8

Prints whether the settings are valid there and why not, the memory of the fullest GPU by component
in both phases, what to change if it does not fit, the tokens of a step, the bytes and seconds of a
sync by link, and the files and bytes of a checkpoint. Of the model only config.json is needed; if
model.path is not there, the shape of the same name in configs/shapes/ is taken.

`--simulate` builds every rank's part of the model without memory, publishes it twice, and checks
that every tensor is sent exactly once and in the same order. The exit code is 1 if something is
wrong, 0 otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError
from megatron_rl.plan.advice import advice
from megatron_rl.plan.memory import Components, kv_bytes_per_token
from megatron_rl.plan.plan import Cluster, MemoryPlan, Plan, make_plan
from megatron_rl.plan.simulate import problems_in, simulate
from megatron_rl.plan.traffic import longest_sequence
from megatron_rl.process.tool import run_tool

GB = 1e9
MAX_SIMULATED = 512
SHAPES = Path(__file__).parents[1] / "configs" / "shapes"
# What to do about each component if no setting of the layout is enough.
_MORE_GPUS = "take more nodes, or engines on GPUs of their own (rollout.placement)"
_REMEDIES = dict.fromkeys(
    ("weights", "gradients", "optimizer", "reference", "communication"), _MORE_GPUS
) | dict.fromkeys(
    ("activations", "logits", "backward"),
    "lower rollout.sampling.max_tokens and with it learner.tokens_per_micro_batch",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, plan and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of a run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-gb", type=float, default=80.0, help="memory of a GPU, in 10^9 bytes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--simulate", action="store_true", help="publish as every rank in turn")
    options = parser.parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore", module=r"megatron\.")  # on optional packages
    return run_tool("plan: not valid", lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    if options.nodes < 1 or options.gpus_per_node < 1 or not 0 < options.gpu_gb < math.inf:
        raise ConfigError("--nodes, --gpus-per-node, --gpu-gb: expected numbers above 0")
    cluster = Cluster(
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_bytes=options.gpu_gb * GB,
        device=options.device,
    )
    config = with_known_shape(load_config(options.config, options.overrides))
    plan = make_plan(config, cluster)
    is_good = tell(config, cluster, plan)
    if options.simulate:
        is_good &= tell_simulation(config, plan)
    return 0 if is_good else 1


def with_known_shape(config: Config) -> Config:
    """The settings, with the shape of the same name in configs/shapes/ if the model is absent."""
    path = Path(config.model.path)
    shape = SHAPES / path.name
    if (path / "config.json").is_file() or not (shape / "config.json").is_file():
        return config
    print(f"note: model.path={path} is not there; planned with the shape in {shape}")
    return replace(config, model=replace(config.model, path=str(shape)))


def tell(config: Config, cluster: Cluster, plan: Plan) -> bool:
    """Print the plan; returns whether the run fits."""
    for line in (*_layout_lines(config, plan), *_memory_lines(config, plan)):
        print(line)
    if not plan.memory.fits:
        for line in _advice_lines(plan, config, cluster):
            print(line)
    for line in _traffic_lines(config, plan):
        print(line)
    return plan.memory.fits


def tell_simulation(config: Config, plan: Plan) -> bool:
    """Publish as every rank in turn, and print what is wrong; returns whether nothing is.

    Raises:
        ConfigError: there are more ranks than can be simulated.
    """
    world_size, geometry = plan.layout.world_size, plan.geometry
    if world_size > MAX_SIMULATED:
        raise ConfigError(
            f"--simulate: expected at most {MAX_SIMULATED} ranks, got {world_size}; lower --nodes"
        )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("ranks", total=world_size)
        ranks = simulate(
            config, geometry, world_size=world_size, on_rank=lambda rank: progress.advance(bar)
        )
    problems = problems_in(ranks, geometry)
    senders = [rank.rank for rank in ranks if rank.syncs[0]]
    print(
        f"simulation: {world_size} ranks, {sum(len(rank.syncs[0]) for rank in ranks)} tensors sent "
        f"by ranks {senders}: {'; '.join(problems) or 'each once, in the same order twice'}"
    )
    return not problems


def _layout_lines(config: Config, plan: Plan) -> list[str]:
    layout, geometry = plan.layout, plan.geometry
    lines = [
        f"model: {config.model.path}, {geometry.model_type}, {plan.num_parameters:,} parameters",
        f"layout: valid, {layout.world_size} ranks on {layout.num_nodes} node(s) = tensor "
        f"{layout.tensor} x context {layout.context} x pipeline {layout.pipeline} x data "
        f"{layout.data}, {layout.dtype}",
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def _memory_lines(config: Config, plan: Plan) -> list[str]:
    memory = plan.memory
    lines = [f"memory of the fullest GPU (pipeline stage {memory.stage}), GB:"]
    lines += _component_lines("learner", memory.learner)
    if memory.engine is None:
        lines.append("  engine   on GPUs of its own")
    else:
        lines += _component_lines("engine", memory.engine)
        tokens = memory.engine.kv_cache / kv_bytes_per_token(config, plan.geometry)
        longest = longest_sequence(config, plan.geometry)
        lines.append(
            f"           the KV cache holds {tokens:,.0f} tokens, {tokens / longest:.1f} sequences "
            f"of {longest:,}"
        )
    lines.append(_phase_line("training", memory.training, memory))
    lines.append(_phase_line("rollout", memory.rollout, memory))
    return lines


def _component_lines(who: str, components: Components) -> list[str]:
    return [f"  {who:8s} {name:14s} {size / GB:8.2f}" for name, size in components.components()]


def _phase_line(phase: str, needed: float, memory: MemoryPlan) -> str:
    verdict = "fits" if needed <= memory.gpu_bytes else "DOES NOT FIT"
    return f"  {phase}: {needed / GB:.1f} of {memory.gpu_bytes / GB:.0f} GB, {verdict}"


def _advice_lines(plan: Plan, config: Config, cluster: Cluster) -> list[str]:
    found = advice(config, cluster)
    if not found.changes:
        largest, size = max(plan.memory.learner.components(), key=lambda part: part[1])
        return [
            "change: no setting of the layout is enough; most of the learner's memory is "
            f"{largest}, {size / GB:.1f} GB: {_REMEDIES[largest]}"
        ]
    how = "one of these is" if found.is_each_enough else "all of these together are"
    lines = [f"  {change}: {size / GB:.1f} GB" for change, size in found.changes]
    return [f"change: {how} enough:", *lines]


def _traffic_lines(config: Config, plan: Plan) -> list[str]:
    step, sync, checkpoint = plan.step, plan.sync, plan.checkpoint
    lines = [
        f"step: {step.num_sequences:,} sequences, at most {step.max_tokens:,} tokens; an update of "
        f"a replica has at most {step.rows_per_update} rows of "
        f"{config.learner.tokens_per_micro_batch:,} tokens",
        f"sync: {sync.num_tensors} tensors, {sync.num_bytes:,} bytes in {sync.num_buckets} buckets "
        f"to each worker of an engine, which keeps {sync.kept_bytes:,} of them; rank 0 holds "
        f"{sync.held_bytes / GB:.2f} GB more; seconds by link, if the link is the limit:",
    ]
    lines += [f"  {link:26s} {seconds:8.2f}" for link, seconds in sync.seconds().items()]
    lines.append(
        f"checkpoint: {checkpoint.num_files} files, {checkpoint.num_bytes:,} bytes each; "
        f"{config.checkpoint.keep + 1} at a time: "
        f"{(config.checkpoint.keep + 1) * checkpoint.num_bytes / GB:,.0f} GB on disk"
    )
    if checkpoint.num_hf_bytes:
        lines.append(f"weights at the end (checkpoint.save_hf): {checkpoint.num_hf_bytes:,} bytes")
    return lines


if __name__ == "__main__":
    sys.exit(main())
