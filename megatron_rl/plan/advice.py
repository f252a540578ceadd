"""Settings with which a run that does not fit its GPUs would fit: each is tried with the run's own
rules and formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config import Config
from megatron_rl.engine.placement import may_share_gpus
from megatron_rl.errors import ConfigError
from megatron_rl.plan.plan import Cluster, make_plan
from megatron_rl.plan.traffic import longest_sample

LARGEST_TENSOR_PARALLEL = 8  # suggested: the GPUs that NVLink joins in a node


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Another value of one setting. Example: `Change(key="parallel.tensor", value=8)`."""

    key: str
    value: Any

    def __str__(self) -> str:
        """As an override on the command line."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}={value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to change. Example: `Advice(changes=((Change(key="parallel.tensor", value=8), 7.2e10),),
    is_each_enough=True)`.
    """

    # each with the bytes of the fullest GPU: after this change alone, or after those before it and
    # this one; empty if not even all together are enough
    changes: tuple[tuple[Change, float], ...]
    is_each_enough: bool  # whether each of them is enough by itself


def advice(config: Config, cluster: Cluster) -> Advice:
    """The settings, each of which is enough by itself; if none is, those that are together."""
    tried = list(_changes(config, cluster))
    single = [(change, _needed(config, (change,), cluster)) for change in tried]
    enough = tuple(pair for pair in single if pair[1] <= cluster.gpu_bytes)
    if enough:
        return Advice(changes=enough, is_each_enough=True)
    taken: dict[str, tuple[Change, float]] = {}  # by key: a later value replaces an earlier one
    least = _needed(config, (), cluster)
    for change in tried:
        others = [each for key, (each, _) in taken.items() if key != change.key]
        needed = _needed(config, (*others, change), cluster)
        if needed < least:
            taken.pop(change.key, None)
            taken[change.key], least = (change, needed), needed
        if least <= cluster.gpu_bytes:
            return Advice(changes=tuple(taken.values()), is_each_enough=False)
    return Advice(changes=(), is_each_enough=False)


def _needed(config: Config, changes: Iterable[Change], cluster: Cluster) -> float:
    """The bytes of the fullest GPU with these changes; infinite if the run could not start."""
    try:
        for change in changes:
            config = _with_setting(config, change.key.split("."), change.value)
        memory = make_plan(config, cluster).memory
    except ConfigError:
        return float("inf")
    return max(memory.training, memory.rollout)


def _with_setting(section: Any, keys: list[str], value: Any) -> Any:
    first, *rest = keys
    inner = _with_setting(getattr(section, first), rest, value) if rest else value
    return replace(section, **{first: inner})


def _changes(config: Config, cluster: Cluster) -> Iterator[Change]:
    """What may save memory, that which costs least speed first."""
    parallel, learner, rollout = config.parallel, config.learner, config.rollout
    if not learner.optimizer.distributed:
        yield Change(key="learner.optimizer.distributed", value=True)
    if config.model.dtype == "float32":
        yield Change(key="model.dtype", value="bfloat16")
    if parallel.tensor > 1:
        yield from _savings_in_activations(config)
    longest = longest_sample(config)
    if config.data.max_prompt_tokens and learner.tokens_per_micro_batch > longest:
        yield Change(key="learner.tokens_per_micro_batch", value=longest)
    for tensor in _doubled(parallel.tensor, min(LARGEST_TENSOR_PARALLEL, cluster.gpus_per_node)):
        yield Change(key="parallel.tensor", value=tensor)
    if parallel.tensor == 1:  # sequence parallelism needs a larger one
        yield from _savings_in_activations(config)
    num_gpus = cluster.num_nodes * cluster.gpus_per_node
    for expert in _doubled(parallel.expert, min(num_gpus, 64)):
        yield Change(key="parallel.expert", value=expert)
    for pipeline in _doubled(parallel.pipeline, num_gpus // parallel.tensor):
        yield Change(key="parallel.pipeline", value=pipeline)
    if config.model.activation_recomputation != "full":
        yield Change(key="model.activation_recomputation", value="full")
    if rollout.num_engines and may_share_gpus(rollout.placement):
        if rollout.placement == "auto" and rollout.max_policy_age == 0:
            yield Change(key="rollout.placement", value="colocated")
        for utilization in (0.6, 0.5, 0.4, 0.3, 0.2):
            if utilization < rollout.gpu_memory_utilization:
                yield Change(key="rollout.gpu_memory_utilization", value=utilization)


def _savings_in_activations(config: Config) -> Iterator[Change]:
    if not config.parallel.sequence_parallel:
        yield Change(key="parallel.sequence_parallel", value=True)
    if config.model.activation_recomputation == "none":
        yield Change(key="model.activation_recomputation", value="selective")


def _doubled(size: int, largest: int) -> Iterator[int]:
    """2, 4, 8, ... times the size."""
    while (size := 2 * size) <= largest:
        yield size
