"""Exchanges Python objects between data-parallel ranks. Each rank sends a separate list to every
other rank, so that no rank has to hold all objects.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def exchange(items_for: Sequence[Sequence[Item]], group: dist.ProcessGroup) -> list[Item]:
    """All-to-all of Python objects between the ranks of a gloo group.

    Args:
        items_for: for every rank of the group, the items to send to it.
    Returns:
        The items that the ranks sent to this rank, in order of the senders' ranks.
    """
    packed = [pickle.dumps(list(items)) for items in items_for]
    send_sizes = torch.tensor([len(each) for each in packed], dtype=torch.int64)
    receive_sizes = torch.empty_like(send_sizes)
    dist.all_to_all_single(receive_sizes, send_sizes, group=group)
    sent = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
    received = torch.empty(int(receive_sizes.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, receive_sizes.tolist(), send_sizes.tolist(), group=group)
    pieces = received.split(receive_sizes.tolist())
    return [item for piece in pieces for item in pickle.loads(piece.numpy().tobytes())]


def gather_from_all(value: Item, group: dist.ProcessGroup) -> list[Item]:
    """All-gather of a small object over a gloo group: those of all ranks, in order of the ranks."""
    values: list[Item] = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
