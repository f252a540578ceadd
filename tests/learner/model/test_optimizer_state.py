"""How a distributed optimizer's parameters are divided, and who writes each, worked by hand. What a
checkpoint holds and how a run goes on is compared in test_checkpoint.py and test_offload.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.learner.model import optimizer_state
from megatron_rl.learner.model.optimizer_state import (
    Pieces,
    _chunks,
    _divided_parameters,
    follow_config,
)


def optimizer(rank: int, size: int = 2) -> SimpleNamespace:
    """Two buckets: 10 elements padded to 12, and behind them 4. Parameters of 3, 7 and 4."""
    a, b, c = (torch.nn.Parameter(torch.zeros(count)) for count in (3, 7, 4))
    buckets = [
        SimpleNamespace(offset=0, grad_data=torch.zeros(12)),
        SimpleNamespace(offset=12, grad_data=torch.zeros(4)),
    ]
    index = {a: (0, 3, 0), b: (3, 10, 0), c: (12, 16, 1)}
    return SimpleNamespace(
        data_parallel_group=SimpleNamespace(size=lambda: size, rank=lambda: rank),
        buffers=[SimpleNamespace(buckets=buckets, param_index_map=index)],
    )


def test_each_rank_has_a_part_of_every_bucket() -> None:
    # Rank 0 holds 0 to 6 and 12 to 14; rank 1 holds 6 to 12, with two of padding, and 14 to 16.
    ranges = [pieces.ranges for pieces in _divided_parameters(optimizer(0))]
    assert ranges == [((0, 3), (0, 0)), ((0, 3), (3, 7)), ((0, 2), (2, 4))]


def test_the_owner_holds_a_piece_and_the_least_so_far() -> None:
    load = [0, 0]
    owners = [pieces.owner(load) for pieces in _divided_parameters(optimizer(0))]
    assert owners == [0, 1, 0]
    assert load == [7, 7]
    alone = Pieces(parameter=torch.nn.Parameter(torch.zeros(5)), ranges=((0, 0), (0, 5)))
    assert alone.owner([0, 100]) == 1


@pytest.mark.parametrize(
    ("rank", "limit", "expected"),
    [
        (0, 2**30, [[3, 7, 4]]),
        (1, 2**30, [[7, 4]]),
        (0, 12 * 10, [[3, 7], [4]]),
        (0, 1, [[3], [7], [4]]),  # one at least
    ],
)
def test_what_is_read_at_a_time(
    rank: int, limit: int, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_state, "LOAD_BYTES", limit)
    chunks = _chunks(optimizer(rank))
    assert [[pieces.parameter.numel() for pieces in chunk] for chunk in chunks] == expected
    assert _chunks(None) == [[]]


def test_a_loaded_group_has_the_rates_of_this_run() -> None:
    """The groups are told apart by what they hold, not by their order."""
    dense = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    own = [
        dense | {"wd_mult": 0.0, "max_lr": 3e-4, "start_wd": None},
        dense | {"max_lr": 2e-4, "start_wd": 0.1},
    ]
    saved = [dense | {"max_lr": 1e-3, "step": 7}, dense | {"wd_mult": 0.0, "max_lr": 1e-3}]
    loaded = {"0": {"optimizer": {"param_groups": saved}}, "1": {"param_groups": []}}
    follow_config(loaded, own)
    assert [group["max_lr"] for group in saved] == [2e-4, 3e-4]
    assert [group["start_wd"] for group in saved] == [0.1, None]
    assert saved[0]["step"] == 7
