"""How well the machines are used: seconds of the slowest rank by phase, throughput and utilisation
of a GPU, memory, the engines' load, and the bandwidth of the weight sync.

MFU is the model's arithmetic in an update, divided by what the GPUs of the learner could do in that
time (Chowdhery et al. 2022, "PaLM", appendix B): for a token of a sequence of L tokens

    6 N + 6 layers x heads x head_dim x L        + 1/3 of it for a separate recomputed pass

with N the parameters that a token passes, without the embedding, and causal attention.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.engine.load import EngineLoad
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.records import SampledStep
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.rules import hf_shapes, tensor_rules

# Dense BF16 of one GPU, in TFLOP/s, from NVIDIA's data sheets; the first name that is part of the
# device's counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}
PHASES = ("rollout", "reward", "learner", "sync")  # whose slowest rank is named
GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUse:
    """What one rank reports of a step. Example: `RankUse(seconds={"learner": 3.2},
    num_tokens=81920, attended=33554432, host_bytes=8e9, device_bytes=6e10)`.
    """

    seconds: Mapping[str, float]
    num_tokens: int  # of the sequences, prompts included; on the heads of replicas
    attended: int  # squares of the sequences' lengths, added up
    host_bytes: float  # the largest so far
    device_bytes: float  # the largest in this step; 0 without a GPU


def use_of_rank(seconds: Mapping[str, float], sampled: SampledStep, *, is_head: bool) -> RankUse:
    """What this rank reports."""
    rollouts = [r for each in sampled.groups for r in each.group.rollouts] if is_head else []
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    device_bytes = 0.0
    if torch.cuda.is_available():
        device_bytes = float(torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
    return RankUse(
        seconds=dict(seconds),
        num_tokens=sum(lengths),
        attended=sum(length**2 for length in lengths),
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        device_bytes=device_bytes,
    )


def peak_of(device_name: str, peak_tflops: float) -> float | None:
    """FLOP/s of a GPU; None if neither the setting nor the table knows it.

    Args:
        device_name: "" on the CPU.
        peak_tflops: the setting `learner.peak_tflops`; 0: by name.
    """
    if peak_tflops:
        return peak_tflops * 1e12
    found = next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
    return None if found is None else found * 1e12


def omission(device_name: str, peak_tflops: float) -> str:
    """Why there is no MFU; "" if there is one, and on the CPU, where none is expected."""
    if not device_name or peak_of(device_name, peak_tflops) is not None:
        return ""
    return f"MFU: left out, no peak is known of {device_name}; set learner.peak_tflops"


def active_parameters(geometry: Geometry) -> int:
    """The parameters that a token passes, without the embedding: of experts the chosen ones."""
    total = 0.0
    for rule in tensor_rules(geometry)[1:]:
        size = sum(torch.Size(shape).numel() for shape in hf_shapes(rule, geometry))
        share = 1.0
        if rule.expert is not None:
            share = geometry.experts.num_chosen / geometry.experts.num_experts
        total += share * size
    if geometry.is_tied:
        total += geometry.vocab_size * geometry.hidden_size
    return round(total)


def update_flops(geometry: Geometry, uses: Sequence[RankUse], *, has_separate_pass: bool) -> float:
    """The arithmetic of an update over the sequences of all ranks."""
    num_tokens = sum(use.num_tokens for use in uses)
    attended = sum(use.attended for use in uses)
    width = geometry.num_layers * geometry.num_heads * geometry.head_dim
    flops = 6.0 * active_parameters(geometry) * num_tokens + 6.0 * width * attended
    return flops * (4 / 3 if has_separate_pass else 1)


def machine_figures(
    uses: Sequence[RankUse],
    geometry: Geometry,
    *,
    has_separate_pass: bool,
    device_name: str,
    peak_tflops: float,
) -> dict[str, float]:
    """The figures of a step, from the reports of all ranks in order of rank."""
    figures: dict[str, float] = {}
    for phase in PHASES:
        seconds = [use.seconds.get(phase, 0.0) for use in uses]
        if max(seconds) > 0:
            figures[f"speed/slowest_seconds/{phase}"] = max(seconds)
            figures[f"speed/slowest_rank/{phase}"] = float(seconds.index(max(seconds)))
    figures["speed/memory/host_gib/max"] = max(use.host_bytes for use in uses) / GIB
    if device_name:
        figures["speed/num_gpus"] = float(len(uses))
        figures["speed/memory/gpu_gib/max"] = max(use.device_bytes for use in uses) / GIB
    learner = figures.get("speed/slowest_seconds/learner", 0.0)
    peak = peak_of(device_name, peak_tflops)
    if peak is not None and learner and any(use.num_tokens for use in uses):
        flops = update_flops(geometry, uses, has_separate_pass=has_separate_pass)
        figures["speed/mfu"] = flops / (learner * len(uses) * peak)
    return figures


def sync_figures(log: Path, step: int) -> dict[str, float]:
    """The bandwidth of the weight sync of a step, from the log of the syncs; {} without one."""
    if not log.is_file():
        return {}
    lines = log.read_text().splitlines()
    line = json.loads(lines[-1]) if lines else {}
    if line.get("version") != step or not line["seconds"].get("total"):
        return {}
    return {"speed/sync_gib_per_second": line["bytes"] / GIB / line["seconds"]["total"]}


class Meter:
    """Measures every step of a run; one on each rank.

    Args:
        load: on rank 0, of the engines; None elsewhere, and in a replay.
        sync_log: with a line for each sync.
    """

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        parallel: Parallel,
        load: EngineLoad | None,
        sync_log: Path,
    ) -> None:
        self._config, self._geometry, self._parallel = config, geometry, parallel
        self._load, self._sync_log = load, sync_log
        is_cuda = parallel.device.type == "cuda"
        self._device_name = torch.cuda.get_device_name(parallel.device) if is_cuda else ""

    @property
    def omission(self) -> str:
        """Why there is no MFU of a GPU; "" if there is nothing to tell."""
        return omission(self._device_name, self._config.learner.peak_tflops)

    def measure(
        self, step: int, seconds: Mapping[str, float], sampled: SampledStep
    ) -> dict[str, float]:
        """The figures of a step; those of the engines and of the sync on rank 0. A collective over
        all ranks.
        """
        own = use_of_rank(seconds, sampled, is_head=self._parallel.is_replica_head)
        uses: list[RankUse] = self._parallel.from_all_ranks(own)
        figures = machine_figures(
            uses,
            self._geometry,
            has_separate_pass=self._config.learner.recompute == "always",
            device_name=self._device_name,
            peak_tflops=self._config.learner.peak_tflops,
        )
        if self._load is not None:
            figures |= self._load.take()
            figures |= sync_figures(self._sync_log, step)
        return figures
