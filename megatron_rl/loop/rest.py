"""Engines that share the GPUs of the learner sleep while the learner works (`rollout.placement=
colocated`): their KV cache is freed and their weights are kept in the host's memory.

An engine on CPUs has nothing to free, and stays awake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rl.config import Config
from megatron_rl.engine.placement import sleeps
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.loop.link import EngineLink


@contextmanager
def engines_asleep(link: EngineLink | None, parallel: Parallel, config: Config) -> Iterator[None]:
    """Let the engines sleep within the context. A collective over all ranks.

    Args:
        link: on rank 0; None on every other rank.

    Raises:
        SyncError: an engine does not fall asleep, or does not wake up. EngineError: it is dead.
    """
    if config.replay or not sleeps(config.rollout.placement, parallel.device.type):
        yield
        return
    parallel.barrier()  # every replica has its samples
    if link is not None:
        with link.calls() as publisher:
            publisher.sleep()
    yield
    if link is not None:
        with link.calls() as publisher:
            publisher.wake()
    parallel.barrier()
