"""The learner processes that send weights together: messages between source 0, which drives an
update, and the others.

A message is plain JSON, sent as two tensors (its length, its bytes) over a gloo group of the
sources, so that it costs no device memory and waits with a timeout.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.errors import SyncError


class Sources:
    """The sources of a run, seen from one of them.

    Args:
        group: a gloo group with the sources in order; None if there is only one source.
        timeout_seconds: of every wait, except for the beginning of an update.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float) -> None:
        self._group = group
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self.index = 0 if group is None else group.rank()
        self.count = 1 if group is None else group.size()

    def tell(self, target: int, value: Any, what: str) -> None:
        """Send a message to source `target`; `what` names it in errors."""
        body = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self._pass("send", torch.tensor([body.numel()]), target, what, self._timeout)
        self._pass("send", body, target, what, self._timeout)

    def tell_all(self, value: Any, what: str) -> None:
        """Send a message to every other source."""
        for target in range(self.count):
            if target != self.index:
                self.tell(target, value, what)

    def hear(self, source: int, what: str, *, is_beginning: bool = False) -> Any:
        """The next message of source `source`.

        Args:
            is_beginning: whether it begins an update, which source 0 may do much later, within the
                timeout of the group.

        Raises:
            SyncError: there is none within the timeout, or the source has ended.
        """
        timeout = None if is_beginning else self._timeout
        length = torch.zeros(1, dtype=torch.int64)
        self._pass("recv", length, source, what, timeout)
        body = torch.empty(int(length), dtype=torch.uint8)
        self._pass("recv", body, source, what, timeout)
        return json.loads(body.numpy().tobytes())

    def _pass(
        self,
        operation: str,
        tensor: torch.Tensor,
        peer: int,
        what: str,
        timeout: datetime.timedelta | None,
    ) -> None:
        assert self._group is not None
        try:
            work = getattr(self._group, operation)([tensor], peer, 0)
            work.wait() if timeout is None else work.wait(timeout)
        except RuntimeError as error:
            within = "" if timeout is None else f" within {timeout.total_seconds():g} s"
            raise SyncError(
                f"source {self.index} of the weights: expected to {operation} {what} "
                f"{'to' if operation == 'send' else 'from'} source {peer}{within}, got: "
                f"{str(error).splitlines()[0]}"
            ) from error
