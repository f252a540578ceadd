"""Addresses of this host."""

from __future__ import annotations

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.process.interface import (
    address_of,
    interface_of,
    is_local,
    is_loopback,
    local_address,
)


def test_loopback() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and not is_loopback("10.1.2.3")
    assert local_address([]) == local_address(["localhost", "127.0.0.2"]) == "127.0.0.1"
    assert address_of("lo") == address_of("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert is_local("localhost") and not is_local("192.0.2.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "no-such-interface"])
def test_every_interface_and_those_of_others_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.host={host}: expected one of .*lo \(127"):
        address_of(host)


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"host 'no-such-host\.invalid': expected a known name"):
        local_address(["no-such-host.invalid"])
