"""The gloo groups for Python objects have the ranks of the groups that they stand beside."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import distributed

from megatron_rl.learner.layout.host_groups import gloo_twin, host_groups
from tests.support.distributed import run_ranks

PAIRS = ([0, 2], [1, 3])


def _twins(rank: int) -> dict[str, Any]:
    own = [distributed.new_group(ranks) for ranks in PAIRS][rank % 2]
    twin = gloo_twin(own, timedelta(seconds=30))
    values = [None] * 2
    distributed.all_gather_object(values, rank, group=twin)
    on_cpu = host_groups(model=own, pp=own, dp=own, timeout=timedelta(seconds=30))
    return {
        "ranks": distributed.get_process_group_ranks(twin),
        "values": values,
        "is_new": twin is not own,
        "backend": distributed.get_backend(twin),
        "is_reused": on_cpu.model is own and on_cpu.world is distributed.group.WORLD,
    }


def test_twins_have_the_ranks_of_their_groups_and_gloo_groups_need_none() -> None:
    for rank, found in enumerate(run_ranks(_twins, 4)):
        assert found == {
            "ranks": PAIRS[rank % 2],
            "values": PAIRS[rank % 2],
            "is_new": True,
            "backend": "gloo",
            "is_reused": True,
        }
