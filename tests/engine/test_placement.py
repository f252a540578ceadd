"""Which GPUs of which node an engine gets."""

from __future__ import annotations

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.placement import place_engines, visible_devices
from megatron_rl.errors import ConfigError
from megatron_rl.process.node import Node, this_node


def placed(num_gpus: int, *, num_ranks: int, count: int = 1, **settings: object) -> list[str]:
    """The places of all nodes, as text."""
    config = RolloutConfig(**settings)
    nodes = [Node(index=index, count=count, num_ranks=num_ranks) for index in range(count)]
    places = [place for node in nodes for place in place_engines(config, node, num_gpus=num_gpus)]
    return [f"{place.index}: {place}" for place in places]


def test_a_share_of_the_gpus_of_each_node() -> None:
    settings = {"num_engines": 3, "tensor_parallel": 2, "placement": "share"}
    assert placed(8, num_ranks=4, count=2, **settings) == [
        "0: node 0, GPU 4+5",
        "2: node 0, GPU 6+7",
        "1: node 1, GPU 4+5",
    ]


def test_the_gpus_of_the_ranks() -> None:
    assert placed(2, num_ranks=2, num_engines=2, placement="colocated") == [
        "0: node 0, GPU 0",
        "1: node 0, GPU 1",
    ]


def test_auto_takes_free_gpus_if_there_are_enough() -> None:
    assert placed(4, num_ranks=2, num_engines=2) == ["0: node 0, GPU 2", "1: node 0, GPU 3"]
    assert placed(2, num_ranks=2, num_engines=1) == ["0: node 0, GPU 0"]


def test_without_gpus_an_engine_is_a_process() -> None:
    assert placed(0, num_ranks=2, num_engines=2) == ["0: node 0", "1: node 0"]


def test_engines_on_nodes_of_their_own_are_started_there() -> None:
    assert placed(8, num_ranks=8, num_engines=4, placement="nodes") == []


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("share", r"expected 4 GPUs on node 0 for 2 engines .*=2 beside the 6 of the ranks, got 2"),
        ("colocated", r"expected 4 GPUs on node 0 for 2 engines of .*=2, got 3"),
        ("auto", r"rollout\.num_engines=2: expected 4 GPUs .*, got 3; start fewer engines"),
    ],
)
def test_too_few_gpus(placement: str, expected: str) -> None:
    num_gpus = 8 if placement == "share" else 3
    settings = {"num_engines": 2, "tensor_parallel": 2, "placement": placement}
    with pytest.raises(ConfigError, match=expected):
        placed(num_gpus, num_ranks=6 if placement == "share" else 3, **settings)


def test_the_gpus_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices((2, 3)) == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,GPU-b")
    assert visible_devices((2, 3)) == "GPU-a,GPU-b"


@pytest.mark.parametrize(
    ("variables", "node"),
    [
        ({}, Node(index=0, count=1, num_ranks=1)),
        ({"WORLD_SIZE": "2", "RANK": "1"}, Node(index=0, count=1, num_ranks=2)),
        (
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1", "RANK": "9"},
            Node(index=1, count=2, num_ranks=8),
        ),
    ],
)
def test_the_node_of_a_rank(
    variables: dict[str, str], node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_node() == node
