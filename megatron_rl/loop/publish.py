"""The weight sync: send the learner's weights to every engine, then run the parity probe.

Rank 0 publishes the weights, every rank of the first replica contributes its shards, and all ranks
take part in the probe. With a transport that has many sources, the first rank of each pipeline
stage sends the tensors of its stage; otherwise rank 0 sends all of them. No rank samples before
`Publication.publish` has returned on every rank.

An engine that is lost on the way is left out, and the weights are sent again to the others. An
update that fails with all engines alive is sent once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_rl.config import Config
from megatron_rl.errors import EngineError, SourceLostError, SyncError
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.loop.broken import check_weights
from megatron_rl.loop.crew import Crew
from megatron_rl.loop.link import EngineLink, log_update
from megatron_rl.loop.restore import no_engines_to_restore
from megatron_rl.loop.state import LoopState
from megatron_rl.objective.fresh_gap import FRESH_GAP
from megatron_rl.observe.stopwatch import Phase
from megatron_rl.sync.contribute import Contributor
from megatron_rl.sync.source import WeightStream, weight_stream
from megatron_rl.sync.transports.transport import has_many_sources

Probe = Callable[[int, str], dict[str, float] | None]


@dataclass(frozen=True, slots=True)
class Publication:
    """How this rank takes part in every publication of the weights."""

    learner: Learner
    # On rank 0; on the other sources of the weights their `Contributor`; None on every other rank.
    link: EngineLink | Contributor | None
    probe: Probe  # `ParityProbe.check`
    crew: Crew | None  # None in a replay, which has no engines
    state: LoopState
    config: Config
    phase: Phase

    def publish(self, version: int | None = None) -> dict[str, float]:
        """Publish the learner's weights; a collective over all ranks.

        Args:
            version: None: the step's, `state.step`.

        Returns:
            The probe's figures, the same on every rank. Empty with `sync.probe_num_tokens=0`, or in
            a replay.

        Raises:
            SyncError: an engine did not receive the learner's weights, or does not serve them.
            EngineError: too few engines are left.
            DivergenceError: a weight is not finite; no engine was told anything.
        """
        if self.crew is None:
            return {}
        version = self.state.step if version is None else version
        with self.phase("sync"):
            check_weights(self.learner.weights_problem(), self.state, self.config)
            has_failed = False
            while True:
                urls, has_changed = self.crew.gather()
                if (has_changed or has_failed) and isinstance(self.link, EngineLink):
                    self.link.publisher.choose(urls)
                checksum, failure = _send(self.learner, self.link, version, self.config)
                if failure := self.learner.parallel.first_problem(failure):
                    is_lost = self.crew.examine(urls)
                    # If all engines answer, one may have been started again by somebody else
                    # meanwhile; any other reason comes again.
                    if has_failed and not is_lost:
                        raise SyncError(failure)
                    has_failed = True
                    continue
                self.crew.take_in(urls)
                self.state.published_version = version
                if not self.config.sync.probe_num_tokens:
                    return {}
                figures = self.probe(version, checksum)
                if figures is not None:
                    if self.state.dual.fresh_gap is not None:
                        self.state.dual.fresh_gap.add(figures[FRESH_GAP], version)
                    return figures

    def restore(self, shortage: str) -> bool:
        """A `Restore`: wait for engines that are starting, and publish the present version to all.

        Raises:
            EngineError: nobody starts an engine, or the learner has other weights than the engines.
        """
        if self.crew is None:
            return no_engines_to_restore(shortage)
        shortage = self.crew.agree(shortage)
        if not shortage:
            return False
        version = self.state.published_version
        if self.state.step - version > 1:
            raise EngineError(
                f"{shortage}; the learner's weights are newer than those of version {version} that "
                "the step needs: expected sync.every=1 to go on"
            )
        self.publish(version)
        return True


def _send(
    learner: Learner, link: EngineLink | Contributor | None, version: int, config: Config
) -> tuple[str, str]:
    """This rank's part of an update: the checksum of all that was sent, on rank 0; and why the
    update failed, or "".
    """
    if link is None:
        _give(learner, config)
        return "", ""
    stream = _stream(learner, config)
    tensors = _Tensors(stream.tensors)
    stream = replace(stream, tensors=tensors)
    try:
        if isinstance(link, Contributor):
            link.contribute(stream)
            return "", ""
        report = link.publisher.publish(stream, version=version)
    except SourceLostError:
        raise
    except SyncError as error:
        # The other ranks give their shards of the tensors that were not sent, and must not wait.
        if not tensors.drain():
            raise
        return "", str(error)
    log_update(link.log, report)
    return report.checksum, ""


class _Tensors:
    """The tensors of an update, which are gathered from other ranks one by one."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._rest = iter(tensors)
        self._is_broken = False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            return next(self._rest)
        except SyncError:
            self._is_broken = True
            raise

    def drain(self) -> bool:
        """Gather the tensors that are left; False if gathering itself has failed."""
        if not self._is_broken:
            for _ in self._rest:
                pass
        return not self._is_broken


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
