"""Nothing of a run on one node listens beyond the host, from its start to its end: torchrun's
agent, the ranks, the engine. Started as a user starts it, with two ranks.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.runs import training
from tests.support.listeners import ListenerWatch, listeners, sockets_of
from tests.support.processes import descendants_of
from tests.support.served_engine import ServedEngine

OPEN_SERVER = """
import socket, sys
listener = socket.create_server(("", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_every_listener_of_a_run_is_on_loopback(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    config = write_config(tmp_path, parallel={"tensor": 2}, loop={"num_steps": 1})
    overrides, variables = served_engine.overrides(), dict(served_engine.variables())
    with (
        training(
            config,
            *overrides,
            num_ranks=2,
            run_dir=tmp_path / "run",
            variables=variables,
        ) as run,
        ListenerWatch(run.pids) as watch,
    ):
        assert run.wait() == 0, run.output
    own = list(watch.seen.values())
    assert len(own) > 3, "the watch saw less than a store and two ranks"
    assert [each for each in own if not each.is_local] == []
    engine = sockets_of([served_engine.pid, *descendants_of(served_engine.pid)])
    of_engine = [each for each in listeners() if each.inode in engine]
    assert served_engine.port in {each.port for each in of_engine}
    assert [each for each in of_engine if not each.is_local] == []


def test_the_watch_sees_a_listener_on_every_interface() -> None:
    pids: list[int] = []
    with ListenerWatch(lambda: pids) as watch:
        server = subprocess.Popen(
            [sys.executable, "-c", OPEN_SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        pids.append(server.pid)
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        with socket.create_connection(("127.0.0.1", port)):
            while port not in {each.port for each in watch.seen.values()}:
                assert server.poll() is None
        server.stdin.close()
        server.wait()
    [seen] = [each for each in watch.seen.values() if each.port == port]
    assert (seen.address, seen.is_local) == ("0.0.0.0", False)
