"""Engines and the learner take turns on the GPUs that they share (`rollout.placement=colocated`).

While the learner works, engines sleep: their KV cache is freed and their weights are kept in the
host's memory. While they are awake, the learner's gradients are freed and its optimizer's state is
in the host's memory (learner/model/offload.py); its weights stay, since they are published
meanwhile. What reads or changes that state, an update, a checkpoint or an update that is taken
back, is done while the engines sleep.

An engine on CPUs has nothing to free, and stays awake; so does the learner's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rl.config import Config
from megatron_rl.engine.placement import sleeps
from megatron_rl.learner.learner import Learner
from megatron_rl.loop.crew import Crew
from megatron_rl.loop.link import EngineLink
from megatron_rl.observe.stopwatch import Phase


def should_take_turns(learner: Learner, config: Config) -> bool:
    """Whether the engines and the learner share GPUs, of which one of them has the memory."""
    return not config.replay and sleeps(config.rollout.placement, learner.parallel.device.type)


def make_room(learner: Learner, config: Config) -> None:
    """Let the engines have the memory first, before they are used."""
    if should_take_turns(learner, config):
        learner.offload()


@contextmanager
def engines_asleep(
    crew: Crew | None, link: EngineLink | None, learner: Learner, config: Config, phase: Phase
) -> Iterator[None]:
    """Let the engines sleep within the context, in which all of the learner's state is on its
    device. An engine that does not fall asleep or wake up is left out. A collective over all ranks.

    Args:
        crew: None in a replay.
        link: on rank 0; None on every other rank.
        phase: times the changes, as `turns`.
    """
    if crew is None or not should_take_turns(learner, config):
        yield
        return
    parallel = learner.parallel
    publisher = None if link is None else link.publisher
    with phase("turns"):
        parallel.barrier()  # every replica has its samples
        crew.fall_asleep(publisher and publisher.sleep)
        parallel.barrier()  # the memory is free
        learner.onload()
    yield
    with phase("turns"):
        learner.offload()
        parallel.barrier()  # on every rank
        crew.wake_up(publisher and publisher.wake)
        parallel.barrier()
