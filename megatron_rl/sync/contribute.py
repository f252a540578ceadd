"""The part of a source that is not source 0 in an update: it fills and sends its own buckets, and
tells source 0 their checksums.

Source 0 (`sync/publish.py`) plans the same buckets from the same specs, and asks the engines to
receive them one after another. While a bucket of another source is received, this source gathers
its next one. If either gives an update up, both go on with the next one (`sync/sources.py`).
"""

from __future__ import annotations

import torch

from megatron_rl.config.loop import SyncConfig
from megatron_rl.errors import SourceLostError, SyncError
from megatron_rl.sync.source import TensorSource, WeightStream
from megatron_rl.sync.sources import Sources
from megatron_rl.sync.transports.transport import sender_class
from megatron_rl.sync.wire import bucket_bytes_of, plan_buckets, wire_specs


class Contributor:
    """Sends this source's tensors in every update; see `Publisher` for the arguments."""

    def __init__(
        self, config: SyncConfig, *, sources: Sources, wire_dtype: torch.dtype | None
    ) -> None:
        self._bucket_bytes = bucket_bytes_of(config.bucket_mib)
        self._wire_dtype = wire_dtype
        self._sources = sources
        self._sender = sender_class(config.transport)(
            source=sources.index,
            num_sources=sources.count,
            timeout_seconds=config.timeout_seconds,
        )

    def __enter__(self) -> Contributor:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._sender.close()

    def contribute(self, stream: WeightStream) -> None:
        """Take part in the update that source 0 publishes.

        Args:
            stream: its specs are those of all tensors, its tensors this source's.

        Raises:
            SyncError: source 0, an engine or this source gave the update up.
            SourceLostError: source 0 has ended or does not answer.
        """
        try:
            self._contribute(stream)
        except SourceLostError:
            raise
        except SyncError as error:
            self._sources.end(str(error))
            raise
        self._sources.end()

    def _contribute(self, stream: WeightStream) -> None:
        specs = wire_specs(stream.specs, self._wire_dtype)
        self._sender.connect(self._sources.offers())
        source = TensorSource(specs, stream.tensors)
        for bucket in plan_buckets(specs, self._bucket_bytes, stream.sources):
            if bucket.source != self._sources.index:
                continue
            completed = source.fill(bucket, self._sender.buffer)
            self._sources.give(completed, f"bucket {bucket.index}")
            self._sender.send(bucket)
        self._sender.flush()
        source.check_exhausted()
