"""The process groups for Python objects and counts: gloo groups, also on GPUs.

A rank that waits in an NCCL collective keeps its GPU and a core busy. The ranks that are not the
head of their replica wait while the head samples and scores, which takes most of a step; in a gloo
collective they sleep.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGroups:
    """Gloo groups with the ranks of the groups of the same names in `Parallel`. Example, without a
    GPU: `HostGroups(model=model_group, pp=pp_group, dp=dp_group, world=dist.group.WORLD)`.
    """

    model: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    world: dist.ProcessGroup


def host_groups(
    *,
    model: dist.ProcessGroup,
    pp: dist.ProcessGroup,
    dp: dist.ProcessGroup,
    timeout: datetime.timedelta,
) -> HostGroups:
    """The gloo groups of the same ranks; the groups themselves if they are not NCCL groups. A
    collective over all ranks.
    """
    world = dist.group.WORLD
    if dist.get_backend(world) != "nccl":
        return HostGroups(model=model, pp=pp, dp=dp, world=world)
    model, pp, dp, world = (gloo_twin(group, timeout) for group in (model, pp, dp, world))
    return HostGroups(model=model, pp=pp, dp=dp, world=world)


def gloo_twin(group: dist.ProcessGroup, timeout: datetime.timedelta) -> dist.ProcessGroup:
    """A gloo group with the ranks of `group`, in the same order. A collective over all ranks, each
    of which passes its own group of one partition of the ranks.
    """
    own = dist.get_process_group_ranks(group)
    partition: list[list[int]] = [own] * dist.get_world_size()
    dist.all_gather_object(partition, own)
    # Every rank must create every group, in the same order.
    twins = {
        ranks: dist.new_group(list(ranks), backend="gloo", timeout=timeout)
        for ranks in sorted(set(map(tuple, partition)))
    }
    return twins[tuple(own)]
