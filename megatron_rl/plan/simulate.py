"""Every rank of a run, one after another in this process: each builds its part of the model on the
meta device and publishes it twice, with the code of the run.

`simulate` returns what each rank sent to engines and exchanged with other ranks; `problems_in`
checks that every Hugging Face tensor leaves the learner exactly once, in the order of the model and
in the same order in both syncs, and that every rank's collectives have their counterparts on the
other ranks, in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.learner.layout.simulated import Exchange, recorded_exchanges, simulated_rank
from megatron_rl.learner.model.export import full_tensors
from megatron_rl.learner.model.meta import meta_parts
from megatron_rl.plan.parameters import tensor_shapes
from megatron_rl.weights.geometry import Geometry

NUM_SYNCS = 2
MAX_PROBLEMS = 5  # told of each kind
Sent = tuple[str, tuple[int, ...]]  # a tensor's name and shape


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRank:
    """What one rank did. Example: `SimulatedRank(rank=0, num_parameters=8190735360,
    syncs=((("model.embed_tokens.weight", (151936, 4096)), ...), ...), exchanges=((), ()))`.
    """

    rank: int
    num_parameters: int  # that it holds
    syncs: tuple[tuple[Sent, ...], ...]  # of each sync, what it sent to engines, in order
    exchanges: tuple[tuple[Exchange, ...], ...]  # of each sync, its collectives, in order


def simulate(
    config: Config,
    geometry: Geometry,
    *,
    world_size: int,
    on_rank: Callable[[int], None] = lambda rank: None,
) -> list[SimulatedRank]:
    """Publish twice as every rank of a world of `world_size`.

    Args:
        on_rank: called with the number of each rank that is done.
    Raises:
        ConfigError: this process is a real rank.
    """
    ranks = []
    for rank in range(world_size):
        ranks.append(_simulate_rank(config, geometry, rank, world_size))
        on_rank(rank)
    return ranks


def _simulate_rank(config: Config, geometry: Geometry, rank: int, world_size: int) -> SimulatedRank:
    syncs, exchanges = [], []
    with simulated_rank(config.parallel, rank=rank, world_size=world_size) as parallel:
        parts = meta_parts(config.model, geometry, parallel)
        for _ in range(NUM_SYNCS):
            with recorded_exchanges() as found:
                sent = full_tensors(parts, geometry, parallel)
                syncs.append(tuple((name, tuple(tensor.shape)) for name, tensor in sent))
            exchanges.append(tuple(found))
        count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return SimulatedRank(
        rank=rank, num_parameters=count, syncs=tuple(syncs), exchanges=tuple(exchanges)
    )


def problems_in(ranks: Sequence[SimulatedRank], geometry: Geometry) -> list[str]:
    """What is wrong with the syncs of a simulated world, one line each; empty if nothing is."""
    found: list[str] = []
    for sync in range(NUM_SYNCS):
        found += _wrong_tensors(ranks, geometry, sync)
        found += _wrong_exchanges(ranks, sync)
    for rank in ranks:
        if len(set(rank.syncs)) > 1 or len(set(rank.exchanges)) > 1:
            found.append(f"rank {rank.rank}: expected the same order in every sync, got another")
    return found


def _wrong_tensors(ranks: Sequence[SimulatedRank], geometry: Geometry, sync: int) -> list[str]:
    expected = tensor_shapes(geometry)
    counts = Counter(sent for rank in ranks for sent in rank.syncs[sync])
    found = []
    for name, shape in expected:
        if counts[name, shape] != 1:
            found.append(
                f"sync {sync}: expected {name} {list(shape)} once, got it {counts[name, shape]} "
                "times"
            )
    unknown = sorted(set(counts) - set(expected))
    found += [f"sync {sync}: got {name} {list(shape)}, not a tensor" for name, shape in unknown]
    places = {sent: place for place, sent in enumerate(expected)}
    for rank in ranks:
        order = [places[sent] for sent in rank.syncs[sync] if sent in places]
        if order != sorted(order):
            found.append(f"sync {sync}: rank {rank.rank} sends in another order than the model's")
    return found[:MAX_PROBLEMS]


def _wrong_exchanges(ranks: Sequence[SimulatedRank], sync: int) -> list[str]:
    """Collectives that a rank would wait in for ever, or that would mix up two tensors."""
    sequences: dict[tuple[str, tuple[int, ...]], dict[int, list[tuple[int, ...]]]] = {}
    for rank in ranks:
        for each in rank.exchanges[sync]:
            of_group = sequences.setdefault((each.kind, each.ranks), {})
            of_group.setdefault(rank.rank, []).append(each.shape)
    found = []
    for (kind, members), by_rank in sequences.items():
        calls = [by_rank.get(member, []) for member in members]
        if any(each != calls[0] for each in calls):
            counts = ", ".join(f"rank {m}: {len(c)}" for m, c in zip(members, calls, strict=True))
            found.append(
                f"sync {sync}: expected the same {kind} calls on all of their ranks, got {counts}"
            )
    return found[:MAX_PROBLEMS]
