"""The learner processes that send weights together: messages between source 0, which drives an
update, and the others.

    source 0                       another source
    {"offers": [...]}          ->  connects
      for each bucket of the other source:
                               <-  {"checksums": [...]}, when the bucket is filled
        {"go": true}           ->  sends the bucket
                               <-  {"end": ""}, after its last bucket

Who gives the update up says why in place of its next message: source 0 with {"stop": reason},
another source with {"end": reason}. So every message is received, whatever goes wrong, and another
update can begin. A source that works reaches its next message in time, since its other waits are
shorter than the group's timeout. After a message that did not come, no update can begin, because
gloo has closed the group's connections.

A message is plain JSON, sent as two tensors (its length, its bytes) over a gloo group of the
sources, so that it costs no device memory.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.errors import SourceLostError, SyncError


class Sources:
    """The sources of a run, seen from one of them.

    Every method raises SourceLostError if a source has ended, or sends nothing within the group's
    timeout.

    Args:
        group: a gloo group with the sources in order; None if there is only one source.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.index = 0 if group is None else group.rank()
        self.count = 1 if group is None else group.size()
        self._waiting: set[int] = set()  # for the offers of this update
        self._sending: set[int] = set()  # that have not ended their part of it
        self._is_open = False  # on another source: it has not ended its part

    # Source 0.

    def open(self) -> None:
        """An update begins; must be followed by `finish` or `stop`."""
        self._waiting, self._sending = set(range(1, self.count)), set()

    def offer(self, offers: Any) -> None:
        """Tell all others the offers."""
        for target in sorted(self._waiting):
            self._tell(target, {"offers": offers}, "the offers of an update")
        self._waiting, self._sending = set(), self._waiting

    def checksums(self, source: int, what: str) -> dict[int, str]:
        """Wait until a source has filled its next bucket, and let it send it.

        Args:
            what: names the bucket.
        Returns:
            The checksums of the tensors that end in the bucket, by index.
        Raises:
            SyncError: the source gave the update up.
        """
        message = self._hear(source, what)
        self._check_end(source, message)
        self._tell(source, {"go": True}, what)
        return dict(message["checksums"])

    def finish(self) -> None:
        """Wait until all others have sent everything.

        Raises:
            SyncError: one of them gave the update up.
        """
        for source in sorted(self._sending):
            self._check_end(source, self._hear(source, "the end of its part"))

    def stop(self, reason: str) -> None:
        """Give the update up, and wait until all others have."""
        for source in sorted(self._sending):
            if "end" not in self._hear(source, "its next message"):
                self._tell(source, {"stop": reason}, "the end of an update")
        for source in sorted(self._waiting):
            self._tell(source, {"stop": reason}, "the end of an update")
        self._waiting, self._sending = set(), set()

    # The others.

    def offers(self) -> Any:
        """Wait for an update, and return its offers; must be followed by `end`.

        Raises:
            SyncError: source 0 gave the update up.
        """
        self._is_open = True
        return self._answer("the offers of an update")["offers"]

    def give(self, checksums: dict[int, str], what: str) -> None:
        """Tell source 0 the checksums of a bucket; returns when it may be sent.

        Raises:
            SyncError: source 0 gave the update up.
        """
        self._tell(0, {"checksums": list(checksums.items())}, what)
        self._answer(what)

    def end(self, reason: str = "") -> None:
        """This source has sent everything, or gives the update up for a reason; ignored if source 0
        did so before.
        """
        if self._is_open:
            self._is_open = False
            self._tell(0, {"end": reason}, "the end of its part")

    def _answer(self, what: str) -> dict[str, Any]:
        message = self._hear(0, what)
        if "stop" in message:
            self._is_open = False
            raise SyncError(f"source 0 of the weights gave the update up: {message['stop']}")
        return message

    def _check_end(self, source: int, message: dict[str, Any]) -> None:
        if "end" in message:
            self._sending.discard(source)
            if reason := message["end"]:
                raise SyncError(f"source {source} of the weights gave the update up: {reason}")

    def _tell(self, target: int, value: Any, what: str) -> None:
        body = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self._pass("send", torch.tensor([body.numel()]), target, what)
        self._pass("send", body, target, what)

    def _hear(self, source: int, what: str) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64)
        self._pass("recv", length, source, what)
        body = torch.empty(int(length), dtype=torch.uint8)
        self._pass("recv", body, source, what)
        return json.loads(body.numpy().tobytes())

    def _pass(self, operation: str, tensor: torch.Tensor, peer: int, what: str) -> None:
        assert self._group is not None
        try:
            getattr(self._group, operation)([tensor], peer, 0).wait()
        except RuntimeError as error:
            raise SourceLostError(
                f"source {self.index} of the weights: expected to {operation} {what} "
                f"{'to' if operation == 'send' else 'from'} source {peer} within "
                f"parallel.timeout_seconds, got: {str(error).splitlines()[0]}"
            ) from error
