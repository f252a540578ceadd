"""`python -m megatron_rl.process.agent --nproc_per_node N -m MODULE ARGUMENTS`: torchrun for one
host, of which nothing listens beyond the host.

It takes torchrun's arguments and is torchrun, except for the rendezvous: torchrun's own serves two
stores on every interface (torch/distributed/elastic/rendezvous: c10d_rendezvous_backend.py and
dynamic_rendezvous.py). The rendezvous of a single agent has nobody to wait for; it is one store on
the loopback interface, which the ranks use too.
"""

from __future__ import annotations

import datetime
import sys
import uuid

from torch.distributed import run
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from megatron_rl.process.loopback import HOST, serve_store

BACKEND = "loopback"
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


def main(arguments: list[str]) -> None:
    """Run torchrun with these arguments and this rendezvous."""
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
    rendezvous = [f"--rdzv_backend={BACKEND}", f"--rdzv_endpoint={HOST}:0"]
    run.main(["--nnodes=1", *rendezvous, f"--rdzv_id={uuid.uuid4()}", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
