"""`python -m megatron_rl.process.agent --nproc_per_node N -m MODULE ARGUMENTS`: torchrun for one
host, of which nothing listens beyond the host.

It takes torchrun's arguments and is torchrun, except for the rendezvous: torchrun's own serves two
stores on every interface (torch/distributed/elastic/rendezvous: c10d_rendezvous_backend.py and
dynamic_rendezvous.py). The rendezvous of a single agent has nobody to wait for; it is one store on
the loopback interface, which the ranks use too.

What a rank has told in one line is the last line: torchrun's warnings, traceback and table are left
out then, and after SIGINT and SIGTERM. Of any other failure they are printed.
"""

from __future__ import annotations

import datetime
import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from megatron_rl.process.loopback import HOST, serve_store
from megatron_rl.process.told import is_stop_told, told_of

BACKEND = "loopback"
# Those of torchrun that log how ranks end, by the names of their modules.
LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
)
LAUNCH_FOLDER = "megatron_rl_launch_"  # of error files, in the temporary folder
STORE_TIMEOUT = datetime.timedelta(minutes=30)  # of the ranks' own calls until they set another


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one agent with itself."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._is_closed = False

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks use the agent's store."""
        return True

    def get_backend(self) -> str:
        """The name under which torchrun knows this rendezvous."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """A store, and this agent as the only one. After a restart of the ranks it is a new store,
        since what the ranks before left in theirs would mislead them.
        """
        store = serve_store(0, STORE_TIMEOUT)
        address = RendezvousStoreInfo(master_addr=HOST, master_port=store.port)
        return RendezvousInfo(store, rank=0, world_size=1, bootstrap_store_info=address)

    def is_closed(self) -> bool:
        """Whether the ranks are done."""
        return self._is_closed

    def set_closed(self) -> None:
        """Called when the ranks are done."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """0: no other agent ever comes."""
        return 0

    def get_run_id(self) -> str:
        """The id of this launch."""
        return self._run_id

    def shutdown(self) -> bool:
        """True: nothing is left open."""
        self._is_closed = True
        return True


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments and this rendezvous; the exit code if it returns.

    Raises:
        ChildFailedError: a rank failed, and none has told the cause in a line; torchrun's report.
    """
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    run_id = str(uuid.uuid4())
    rendezvous = [f"--rdzv_backend={BACKEND}", f"--rdzv_endpoint={HOST}:0", f"--rdzv_id={run_id}"]
    given = ["--nnodes=1", *rendezvous, *arguments]
    parsed = run.parse_args(given)
    # Without --log-dir torchrun makes a folder of error files itself, and leaves it behind.
    launch = tempfile.TemporaryDirectory(prefix=LAUNCH_FOLDER, ignore_cleanup_errors=True)
    with launch as own, _held_warnings() as held:
        folder = Path(parsed.log_dir or own)
        try:
            run.main(given if parsed.log_dir else [f"--log-dir={own}", *given])
        except ChildFailedError:
            line = told_of(last_attempt(folder, run_id))
            if not line:
                _print(held)
                raise
            if parsed.redirects != "0":
                _say(line)  # it may be in the log of a rank that is not shown here
            return 1
        except SignalException as stop:
            if not is_stop_told(last_attempt(folder, run_id)):
                _say(f"stopped by {signal.Signals(stop.sigval).name}: before the first step")
            return 1
    return 0


def last_attempt(folder: Path, run_id: str) -> Path:
    """The folder of the ranks that were started last; a path without files if none were.

    Args:
        folder: of torchrun's logs, `<folder>/<run_id>_<letters>/attempt_<n>`.
        run_id: of this launch.
    """
    attempts = folder.glob(f"{run_id}_*/attempt_*")
    return max(attempts, key=lambda path: int(path.name.split("_")[1]), default=folder / "none")


@contextmanager
def _held_warnings() -> Iterator[list[logging.LogRecord]]:
    """Hold what torchrun logs about ranks that it ends, in a list, instead of printing it."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(hold)
    try:
        yield held
    finally:
        for logger in loggers:
            logger.removeFilter(hold)


def _print(records: list[logging.LogRecord]) -> None:
    for record in records:
        logging.getLogger(record.name).callHandlers(record)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
