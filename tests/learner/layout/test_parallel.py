"""Each rank's place in every layout, and what goes from rank to rank."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.config import ParallelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.parallel import check_world_size, initialize_parallel

# Rank r of TP x DP x PP: tensor ranks are next to each other, pipeline stages farthest apart.
PLACES = {  # (tp, pp, dp) of ranks 0, 1, ...
    "tp1": [(0, 0, 0)],
    "tp2": [(0, 0, 0), (1, 0, 0)],
    "pp2": [(0, 0, 0), (0, 1, 0)],
    "dp2": [(0, 0, 0), (0, 0, 1)],
    "tp2_pp2": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)],
    "tp2_dp2": [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)],
    "pp2_dp2": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)],
}
# Ranks that share a row are between tensor ranks and replicas: (tp, cp, pp, dp).
SHARED_PLACES = {
    "cp2": [(0, 0, 0, 0), (0, 1, 0, 0)],
    "tp2_sp_cp2": [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0)],
    "cp2_dp2": [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1), (0, 1, 0, 1)],
    "cp2_pp2_vpp2": [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0)],
}


@pytest.mark.parametrize("case", PLACES)
def test_places(case: str, outcome_of: Any) -> None:
    ranks = outcome_of("parallel", case)
    assert [rank["place"] for rank in ranks] == PLACES[case]
    sizes = tuple(max(place[axis] for place in PLACES[case]) + 1 for axis in range(3))
    for rank in ranks:
        tensor, pipeline, _ = rank["place"]
        assert rank["size"] == sizes
        is_head = tensor == 0 and pipeline == 0
        assert rank["ends"] == (pipeline == 0, pipeline == sizes[1] - 1, is_head)


@pytest.mark.parametrize("case", PLACES)
def test_exchanges(case: str, outcome_of: Any) -> None:
    rank_at = {place: rank for rank, place in enumerate(PLACES[case])}
    for rank in outcome_of("parallel", case):
        tensor, pipeline, replica = rank["place"]
        assert rank["replica_head"] == rank_at[0, 0, replica]
        assert rank["last_stage"] == rank_at[tensor, rank["size"][1] - 1, replica]
        peers = [rank_at[tensor, pipeline, other] for other in range(rank["size"][2])]
        assert rank["reduced"] == [sum(peers), max(peers)]


@pytest.mark.parametrize("case", SHARED_PLACES)
def test_ranks_that_share_a_row_are_one_replica(case: str, outcome_of: Any) -> None:
    rank_at = {place: rank for rank, place in enumerate(SHARED_PLACES[case])}
    for rank, (tensor, context, pipeline, replica) in zip(
        outcome_of("parallel", case), SHARED_PLACES[case], strict=True
    ):
        assert rank["place"] == (tensor, pipeline, replica)
        assert rank["row_head"] == (context == 0)
        assert rank["ends"][2] == (tensor == context == pipeline == 0)
        assert rank["replica_head"] == rank_at[0, 0, 0, replica]
        replicas = {other for *_, other in SHARED_PLACES[case]}
        peers = [rank_at[tensor, context, pipeline, other] for other in replicas]
        assert rank["reduced"] == [sum(peers), max(peers)]


@pytest.mark.parametrize("case", [case for case in PLACES if len(PLACES[case]) > 1])
def test_ranks_of_one_host_listen_on_loopback_alone(case: str, outcome_of: Any) -> None:
    """Training, a warm start and a conversion connect their ranks in this way, with gloo groups for
    each axis of the layout.
    """
    for rank in outcome_of("parallel", case):
        assert rank["listens_on"] == {"127.0.0.1"}


def test_a_world_that_the_layout_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="a multiple of tensor x context x pipeline = 6, got 4"):
        initialize_parallel(ParallelConfig(tensor=3, pipeline=2), seed=0)


def test_a_world_that_the_experts_do_not_divide() -> None:
    sizes = {"expert": 4, "expert_tensor": 2, "pipeline": 2}
    assert check_world_size(ParallelConfig(**sizes), 32) == 32
    with pytest.raises(ConfigError, match="expert x expert_tensor x pipeline = 16, got 24"):
        check_world_size(ParallelConfig(**sizes), 24)


# Of a layout: (ep, etp, copy) of ranks 0, 1, ... in their pipeline stage.
EXPERT_PLACES = {
    "ep2": [(0, 0, 0), (1, 0, 0)],
    "etp2": [(0, 0, 0), (0, 1, 0)],
    "tp2_sp_ep2": [(0, 0, 0), (1, 0, 0)],
    "cp2_ep2": [(0, 0, 0), (1, 0, 0)],
    "tp2_sp": [(0, 0, 0), (0, 0, 1)],
    "pp2_vpp2_ep2": [(0, 0, 0), (1, 0, 0), (0, 0, 0), (1, 0, 0)],
    "tp2_sp_ep2_etp2": [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)],
}


@pytest.mark.parametrize("case", EXPERT_PLACES)
def test_places_of_experts(case: str, outcome_of: Any) -> None:
    model = "mixtral" if case == "tp2_sp" else "qwen2_moe"
    model = "qwen3_moe" if case in ("etp2", "cp2_ep2", "pp2_vpp2_ep2") else model
    num_experts = 4 if model == "mixtral" else 8
    ranks = outcome_of(model, case)["experts"]
    for rank, (expert, shard, copy) in zip(ranks, EXPERT_PLACES[case], strict=True):
        assert rank["place"] == (expert, shard, copy)
        size = max(place[0] for place in EXPERT_PLACES[case]) + 1
        first = expert * num_experts // size
        assert rank["own"] == list(range(first, first + num_experts // size))
        assert rank["is_exported"] == (copy == 0)
        assert not rank["is_exported"] or rank["holder"] == rank["rank"]
