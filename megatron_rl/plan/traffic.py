"""The bytes of a weight sync and of a checkpoint, and the tokens of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_rl.config import Config
from megatron_rl.plan.layout import ITEM_SIZES, ClusterLayout
from megatron_rl.plan.parameters import largest_tensor, num_parameters, tensor_shapes
from megatron_rl.plan.slices import worker_bytes
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.quantization import quantized_shapes

# What one sender moves in practice, in bytes a second; about nine tenths of the link's rate, and
# for shared memory a copy to the host with a checksum.
LINKS = {
    "shared memory of one host": 5e9,
    "100 Gbit/s Ethernet": 11e9,
    "400 Gbit/s InfiniBand": 45e9,
    "PCIe 5.0 x16": 50e9,
    "NVLink 4 (H100)": 400e9,
}
MAIN_STATE_BYTES = 12  # of a parameter in a checkpoint: a float32 main weight and two moments
WRITER_FILES = 2  # of each rank that writes: Megatron's writer has two threads
# .metadata, common.pt, metadata.json and run_state.json
FILES_OF_ALL = 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPlan:
    """One publication of the weights to every engine.

    Example: `SyncPlan(num_tensors=399, num_bytes=16381470720, kept_bytes=16381470720,
    num_buckets=245, held_bytes=2.5e9)`.
    """

    num_tensors: int
    num_bytes: int  # that each worker of an engine receives
    kept_bytes: int  # of these, in the slices of a worker
    num_buckets: int
    held_bytes: int  # on rank 0: the largest tensor, in pieces and joined

    def seconds(self) -> dict[str, float]:
        """By link, of a sync whose time is the transfer's."""
        return {link: self.num_bytes / rate for link, rate in LINKS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The samples of one step. Example: `StepPlan(num_sequences=512, max_tokens=5242880,
    rows_per_update=16)`.
    """

    num_sequences: int
    max_tokens: int  # if every prompt and response has its largest length
    rows_per_update: int  # of each replica, at that length


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlan:
    """What one checkpoint takes on disk. Example: `CheckpointPlan(num_files=28,
    num_bytes=114670295040, num_hf_bytes=16381470720)`.
    """

    num_files: int
    num_bytes: int
    num_hf_bytes: int  # of the Hugging Face checkpoint at the end; 0 without checkpoint.save_hf


def wire_bytes(config: Config, geometry: Geometry) -> int:
    """The bytes of the model's tensors as engines receive and hold them."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in _wire(config, geometry))


def _wire(config: Config, geometry: Geometry) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    quantization, dtype = config.rollout.quantization, _DTYPES[config.rollout.dtype]
    sent = quantized_shapes(quantization, tensor_shapes(geometry), dtype)
    return [(of_tensor, shape) for _, of_tensor, shape in sent]


def sync_plan(config: Config, geometry: Geometry) -> SyncPlan:
    """The sync of a run."""
    sent = wire_bytes(config, geometry)
    return SyncPlan(
        num_tensors=len(_wire(config, geometry)),
        num_bytes=sent,
        kept_bytes=worker_bytes(config, geometry, _DTYPES[config.rollout.dtype]),
        num_buckets=math.ceil(sent / (config.sync.bucket_mib * 2**20)),
        held_bytes=2 * largest_tensor(geometry) * ITEM_SIZES[config.model.dtype],
    )


def step_plan(config: Config, geometry: Geometry, layout: ClusterLayout) -> StepPlan:
    """The samples of a step at their largest lengths."""
    loop, learner = config.loop, config.learner
    sequences = loop.prompts_per_step * loop.samples_per_prompt
    longest = longest_sample(config)
    per_row = max(1, learner.tokens_per_micro_batch // longest)
    of_update = math.ceil(sequences / (learner.mini_batches_per_step * layout.data))
    return StepPlan(
        num_sequences=sequences,
        max_tokens=sequences * min(longest, longest_sequence(config, geometry)),
        rows_per_update=math.ceil(of_update / per_row),
    )


def longest_sample(config: Config) -> int:
    """The tokens of the longest prompt with its response."""
    max_prompt = config.data.max_prompt_tokens
    if not max_prompt:  # whatever has room in a row
        return config.learner.tokens_per_micro_batch
    return max_prompt + config.rollout.sampling.max_tokens


def longest_sequence(config: Config, geometry: Geometry) -> int:
    """The tokens of the longest sequence that an engine accepts."""
    return config.rollout.max_model_len or geometry.max_position_embeddings


def checkpoint_plan(config: Config, geometry: Geometry, layout: ClusterLayout) -> CheckpointPlan:
    """A checkpoint of a run: the ranks of one replica write, every rank its random state."""
    size = ITEM_SIZES[layout.dtype]
    is_main = layout.dtype == "float32" and not layout.has_distributed_optimizer
    of_parameter = MAIN_STATE_BYTES + (0 if is_main else size)
    count = num_parameters(geometry)
    # Of a stage the first ranks hold the copies that are written, of experts and of the rest.
    num_writers = max(layout.tensor, layout.expert * layout.expert_tensor) * layout.pipeline
    return CheckpointPlan(
        num_files=WRITER_FILES * num_writers + FILES_OF_ALL + layout.world_size,
        num_bytes=count * of_parameter,
        num_hf_bytes=count * size if config.checkpoint.save_hf else 0,
    )
