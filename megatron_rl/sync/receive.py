"""The receiving half of the update protocol, in every worker of an engine; `sync/publish.py` is the
sending half.

It parses the bodies of vLLM's weight routes and passes complete, checked tensors, in order, to the
caller, which loads them. This module depends neither on vLLM (see `sync/engine_side/plugin.py`) nor
on the way the bytes are transported (see `sync/transports/`).

Tensors are loaded in place as they arrive, so an update cannot be rolled back. Until all tensors
have arrived, the worker's weights are *incomplete*, and only a later, complete update makes them
whole. Meanwhile the server in front of the engine is *poisoned*: it refuses every request that
depends on the weights (see `engine/gate.py`). "Poisoned" is a state of the API server,
"incomplete" one of a worker's model; neither process can see the other's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from megatron_rl.errors import SyncError
from megatron_rl.sync.assembly import Assembly, check_manifest
from megatron_rl.sync.transports.transport import Receiver, receiver_class
from megatron_rl.sync.wire import TensorSpec, bucket_from_json, manifest_from_json

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], object]  # must consume all


class UpdateReceiver:
    """Receives the updates of one worker, one after another.

    Args:
        expected: the tensors that an update must contain, by name.
        worker: the index of this worker in its engine, from 0.
        device: the device of the worker's model.
    """

    def __init__(
        self, expected: Mapping[str, TensorSpec], *, worker: int, device: torch.device
    ) -> None:
        self._expected = expected
        self._worker = worker
        self._device = device
        self._transport_name = ""
        self._transport: Receiver | None = None
        self._num_tensors = 0  # in the update that `connect` announced
        self._assembly: Assembly | None = None  # of the current update, after its manifest
        self._is_open = False  # an update was started, and has neither failed nor finished
        self._incomplete_because = ""  # "" if the weights are whole

    @property
    def is_incomplete(self) -> bool:
        """Whether the model may hold a partial update."""
        return self._incomplete_because != ""

    def connect(self, transport: str, num_tensors: int, offer: dict[str, Any]) -> None:
        """Connect to the sender; called before each update.

        Args:
            transport: the name of a module in sync/transports/.
            num_tensors: number of tensors in the update that follows.
            offer: the offer that the transport's Sender made.
        """
        if self._transport is None or transport != self._transport_name:
            self.close()
            self._transport = receiver_class(transport)(worker=self._worker, device=self._device)
            self._transport_name = transport
        self._transport.connect(offer)
        self._num_tensors = num_tensors

    def start(self) -> None:
        """Begin an update; from now on the weights are incomplete.

        Raises:
            SyncError: the transport is not connected yet.
        """
        if self._transport is None:
            raise SyncError(
                "start: expected /init_weight_transfer_engine before it, got no connection to a "
                "sender"
            )
        self._assembly, self._is_open = None, True
        self._incomplete_because = "its update has not finished"

    def update(
        self,
        *,
        manifest: dict[str, Any] | None,
        bucket: dict[str, Any] | None,
        abandon: str | None,
        load: Load,
    ) -> None:
        """Process one message of the sender: first the manifest, then one bucket per message. A
        message with `abandon` gives the reason why the sender abandons the update.

        Args:
            load: called with the tensors that a bucket completed, on the transport's device.

        Raises:
            SyncError: a message is out of order, bytes differ from the announced ones, or the
                sender abandoned the update. The update has then failed.
        """
        if not self._is_open:
            raise SyncError(f"update: expected a start before it; {self._reason()}")
        try:
            if abandon is not None:
                raise SyncError(f"the sender gave the update up: {abandon}")
            if manifest is not None:
                self._begin(manifest)
            elif bucket is not None:
                self._take(bucket, load)
            else:
                raise SyncError(
                    "update: expected a manifest, a bucket or abandon, got none of them"
                )
        except BaseException as error:
            self._assembly, self._is_open = None, False
            self._incomplete_because = f"its update failed: {error}"
            raise

    def check_complete(self) -> None:
        """Raise SyncError unless every announced tensor has arrived."""
        if self._assembly is None:
            raise SyncError(
                f"finish: expected a manifest and its tensors before it; {self._reason()}"
            )
        self._assembly.check_complete()

    def complete(self) -> None:
        """Mark the weights as whole: the model holds the complete update, and nothing else."""
        self._assembly, self._is_open, self._incomplete_because = None, False, ""

    def close(self) -> None:
        """Disconnect from the sender. May be called twice."""
        if self._transport is not None:
            self._transport.close()
        self._transport = None

    def _reason(self) -> str:
        if self._incomplete_because:
            return f"the weights are incomplete: {self._incomplete_because}"
        return "the weights are whole"

    def _begin(self, value: dict[str, Any]) -> None:
        if self._assembly is not None:
            raise SyncError("update: expected buckets after the manifest, got a second manifest")
        manifest = manifest_from_json(value)
        check_manifest(manifest, self._expected)
        if len(manifest.specs) != self._num_tensors:
            raise SyncError(
                f"manifest: expected {self._num_tensors} tensors, got {len(manifest.specs)}"
            )
        self._assembly = Assembly(
            manifest, self._transport.buffer, is_memory_kept=self._transport.is_memory_kept
        )

    def _take(self, value: dict[str, Any], load: Load) -> None:
        if self._assembly is None:
            raise SyncError("update: expected the manifest before the first bucket, got a bucket")
        bucket, checksums = bucket_from_json(value)
        self._transport.receive(bucket)
        load(self._assembly.tensors_of(bucket, checksums))
        self._transport.acknowledge(self._assembly.digests)
