"""Stores on the loopback interface, and which one the ranks of one host get."""

from __future__ import annotations

import datetime
import os
import socket

import pytest
from torch import distributed

from megatron_rl.process import loopback
from megatron_rl.process.loopback import is_one_host, rank_store, serve_store, use_loopback
from tests.support.listeners import listeners, sockets_of

TIMEOUT = datetime.timedelta(seconds=20)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(loopback.AGENT_STORE_VARIABLE, raising=False)


def own_listeners() -> list[tuple[str, int]]:
    own = sockets_of([os.getpid()])
    return [(each.address, each.port) for each in listeners() if each.inode in own]


def test_a_store_listens_on_loopback_alone() -> None:
    before = own_listeners()
    store = serve_store(0, TIMEOUT)
    assert set(own_listeners()) == {*before, ("127.0.0.1", store.port)}
    client = distributed.TCPStore("127.0.0.1", store.port, timeout=TIMEOUT, wait_for_workers=False)
    client.set("key", "value")
    assert store.get("key") == b"value"


def test_torch_s_own_store_does_not() -> None:
    """When this fails for a new release, the listening socket may be left to torch."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert ("127.0.0.1", store.port) not in own_listeners()


def set_ranks(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_which_store_a_rank_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(rank_store(TIMEOUT), distributed.HashStore)  # alone
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    set_ranks(monkeypatch, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="0", MASTER_PORT=str(port))
    served = rank_store(TIMEOUT)
    assert ("127.0.0.1", port) in own_listeners()
    monkeypatch.setenv("RANK", "1")
    used = rank_store(TIMEOUT)
    assert served is not None and used is not None
    used.set("a", "b")
    assert served.get("a") == b"b"
    monkeypatch.setenv(loopback.AGENT_STORE_VARIABLE, "True")
    assert rank_store(TIMEOUT) is None
    set_ranks(monkeypatch, WORLD_SIZE="4", TORCHELASTIC_USE_AGENT_STORE="False")
    assert rank_store(TIMEOUT) is None  # two hosts


def test_what_counts_as_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_one_host()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_one_host()  # nobody says where the other rank is
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert is_one_host()


def test_an_interface_that_the_user_names_stays() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "eth0"}
    use_loopback(environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "lo"}
