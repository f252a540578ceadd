"""The addresses of this host, and which of them other hosts can reach. IPv4 only."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, MutableMapping

import psutil

from megatron_rl.errors import ConfigError
from megatron_rl.process.loopback import HOST

_DISCARD_PORT = 9  # of a socket that is connected and never used


def is_loopback(host: str) -> bool:
    """Whether a host name or address is that of the loopback interface.

    Raises:
        ConfigError: the name is unknown.
    """
    return ipaddress.ip_address(resolved(host)).is_loopback


def is_local(host: str) -> bool:
    """Whether a host name or address is this host's; raises ConfigError if the name is unknown."""
    return is_loopback(host) or resolved(host) in _all_addresses()


def resolved(host: str) -> str:
    """The IPv4 address of a host name or address; raises ConfigError if it is unknown."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"host {host!r}: expected a known name or an address, {error}") from error


def local_address(peers: Iterable[str]) -> str:
    """The address at which `peers` reach this host: that from which the first peer beyond the
    loopback interface is reached; 127.0.0.1 if there is none.

    Args:
        peers: host names or addresses.

    Raises:
        ConfigError: a name is unknown, or there is no route to the peer.
    """
    for peer in peers:
        if is_loopback(peer):
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((resolved(peer), _DISCARD_PORT))  # sends nothing
            except OSError as error:
                raise ConfigError(f"host {peer!r}: expected a route to it, {error}") from error
            return probe.getsockname()[0]
    return HOST


def use_route(environment: MutableMapping[str, str]) -> None:
    """Have gloo listen on the interface by which the first node is reached, unless
    GLOO_SOCKET_IFNAME names another. Without it gloo takes the address of the host's name, which
    may be one that other hosts do not reach.
    """
    address = local_address([environment["MASTER_ADDR"]])
    if address != HOST:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface_of(address))


def address_of(interface: str) -> str:
    """The address of an interface, or the address itself if it is one of this host's.

    Raises:
        ConfigError: this host has no such interface or address, or it is that of all interfaces.
    """
    addresses = _addresses()
    if interface in addresses:
        return addresses[interface]
    if interface in _all_addresses():
        return interface
    raise ConfigError(
        f"rollout.host={interface}: expected one of this host's interfaces or its address, "
        + ", ".join(f"{name} ({address})" for name, address in sorted(addresses.items()))
    )


def interface_of(address: str) -> str:
    """The name of the interface of this host that has the address; raises ConfigError if none."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise ConfigError(f"rollout.host={address}: expected an address of this host")


def _all_addresses() -> set[str]:
    return {
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def _addresses() -> dict[str, str]:
    """The first IPv4 address of each interface, by name."""
    found: dict[str, str] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                found.setdefault(name, entry.address)
    return found
