"""Network namespaces as hosts, joined by a bridge in a namespace of its own: nothing of them is
visible outside. As root, with iproute2.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Example: `Host(namespace="mrl4711_1", interface="eth0", address="10.77.0.1")`."""

    namespace: str
    interface: str
    address: str

    def command(self, *words: object) -> list[str]:
        """The command line that runs `words` on this host."""
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]

    def cut_cable(self) -> None:
        """Nothing leaves or reaches this host any more, and nobody is told."""
        self._set("down")

    def join_cable(self) -> None:
        """As it was before."""
        self._set("up")

    def pids(self) -> list[int]:
        """All processes on this host."""
        found = _ip("netns", "pids", self.namespace)
        return [int(pid) for pid in found.split()]

    def _set(self, state: str) -> None:
        _ip("-n", self.namespace, "link", "set", self.interface, state)


def why_not() -> str:
    """Why hosts cannot be made here; "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"mrl{os.getpid()}_try"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not allowed here: {error}"
    return ""


@contextmanager
def joined_hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts; all of their processes are killed at the end."""
    prefix = f"mrl{os.getpid()}"
    bridge = f"{prefix}_b"
    hosts = [
        Host(namespace=f"{prefix}_{i}", interface="eth0", address=f"10.77.0.{i}")
        for i in range(1, count + 1)
    ]
    try:
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for number, host in enumerate(hosts):
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            veth = ("link", "add", f"p{number}", "type", "veth", "peer", "name", host.interface)
            _ip("-n", bridge, *veth, "netns", host.namespace)
            _ip("-n", bridge, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            host.join_cable()
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in host.pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
                _ip("netns", "del", host.namespace)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", bridge)


def start_on(
    host: Host, command: Sequence[object], log: Path, cwd: Path, variables: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command on a host, with its output in `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            host.command(*command),
            cwd=cwd,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ip(*words: str) -> str:
    result = subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    return result.stdout
