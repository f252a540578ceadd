"""What the ranks that send weights send them with: the publisher of rank 0, and with a transport
that has many sources the contributor of each of the other sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from megatron_rl.config import Config
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.health import seconds_of_silence
from megatron_rl.engine.roster import Roster
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.loop.ahead import is_ahead
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.sources import Sources
from megatron_rl.sync.transports.transport import has_many_sources


def make_publisher(
    config: Config,
    addresses: Sequence[EngineAddress],
    parallel: Parallel,
    roster: Roster,
    stack: ExitStack,
) -> Publisher:
    """The publisher of rank 0; `stack` ends it."""
    health_timeout = config.rollout.health_timeout_seconds
    publisher = Publisher(
        addresses,
        config.sync,
        wire_dtype=DTYPES[config.rollout.dtype],  # the engines'
        sources=_sources(config, parallel),
        drain_seconds=_drain_seconds(config),
        silence_seconds=lambda url: seconds_of_silence(url, roster, health_timeout),
        leave_out=roster.leave_out,
    )
    return stack.enter_context(publisher)


def make_contributor(config: Config, parallel: Parallel, stack: ExitStack) -> Contributor | None:
    """How a rank other than 0 sends weights, which `stack` ends; None if it sends none."""
    sources = None if config.replay else _sources(config, parallel)
    if sources is None:
        return None
    wire_dtype = DTYPES[config.rollout.dtype]  # the engines'
    return stack.enter_context(Contributor(config.sync, sources=sources, wire_dtype=wire_dtype))


def _sources(config: Config, parallel: Parallel) -> Sources | None:
    """The ranks that send weights; None on a rank that sends none, and if rank 0 sends all."""
    if not has_many_sources(config.sync.transport) or not parallel.is_weight_source:
        return None
    group = parallel.host.pp if parallel.pp_size > 1 else None
    return Sources(group)


def _drain_seconds(config: Config) -> float:
    """The longest time until requests end that are in flight when weights are published."""
    return config.rollout.request_timeout_seconds if is_ahead(config) else 0.0
