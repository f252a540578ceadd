"""The weight sync: send the learner's weights to every engine, then run the parity probe.

Rank 0 publishes the weights, every rank of the first replica contributes its shards, and all ranks
take part in the probe. With a transport that has many sources, the first rank of each pipeline
stage sends the tensors of its stage; otherwise rank 0 sends all of them. No rank samples before
`publish_weights` has returned on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rl.config import Config
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.loop.link import EngineLink, log_update
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.source import WeightStream, weight_stream
from megatron_rl.sync.transports.transport import has_many_sources


def publish_weights(
    learner: Learner,
    link: EngineLink | Contributor | None,
    probe: Callable[[int, str], dict[str, float]],
    state: LoopState,
    config: Config,
    phase: Phase,
) -> dict[str, float]:
    """Publish the learner's weights as version `state.step`; a collective over all ranks.

    Args:
        link: on rank 0; on the other sources of the weights their `Contributor`; None on every
            other rank.
        probe: `ParityProbe.check`.

    Returns:
        The probe's figures, the same on every rank. Empty with `sync.probe_num_tokens=0`, or in a
        replay, which has no engines.

    Raises:
        SyncError: an engine did not receive the learner's weights, or does not serve them.
    """
    if config.replay:
        return {}
    with phase("sync"):
        checksum = ""  # known on rank 0
        if isinstance(link, EngineLink):
            checksum = _publish(learner, link, state.step, config)
        elif isinstance(link, Contributor):
            link.contribute(_stream(learner, config))
        else:
            _give(learner, config)
        # Replicas that send no shards arrive here early, but must not sample before the update.
        learner.parallel.barrier()
        state.published_version = state.step
        if not config.sync.probe_num_tokens:
            return {}
        return probe(state.step, checksum)


def _publish(learner: Learner, link: EngineLink, version: int, config: Config) -> str:
    """Send the weights; the checksum of all that was sent."""
    with link.calls() as publisher:
        report = publisher.publish(_stream(learner, config), version=version)
    log_update(link.log, report)
    return report.checksum


def _stream(learner: Learner, config: Config) -> WeightStream:
    """The specs of all tensors, and the tensors that this rank sends."""
    is_shared = has_many_sources(config.sync.transport)
    return weight_stream(
        learner.tensor_shapes(),
        learner.owned_tensors() if is_shared else learner.full_tensors(),
        quantization=config.rollout.quantization,
        dtype=DTYPES[config.model.dtype],
        sources=learner.tensor_stages() if is_shared else (),
    )


def _give(learner: Learner, config: Config) -> None:
    """Contribute shards to the sources."""
    if has_many_sources(config.sync.transport):
        for _ in learner.owned_tensors():
            pass
    else:
        learner.give_tensors()
