"""[door: vllm] The weight-transfer backend inside the engine: shared memory on one host.

In: the calls of vLLM's weight-transfer API (vllm/distributed/weight_transfer/base.py), whose bodies
`sync/publish.py` writes. Out: a model that holds the published weights, all of them, or a poisoned
engine. vLLM loads each layer in place as it arrives, so in the middle of an update there is no way
back: from start until a complete finish the engine is poisoned, a finish before that fails, and the
next start takes the broken reload back before it begins anew.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_rl.errors import SyncError
from megatron_rl.process.lifetime import die_with_parent
from megatron_rl.records import WEIGHT_BACKEND
from megatron_rl.sync.assembly import Assembly, check_manifest
from megatron_rl.sync.transports.segment import Segment, SegmentAddress
from megatron_rl.sync.wire import (
    DIGEST_BYTES,
    TensorSpec,
    bucket_from_json,
    manifest_from_json,
)

# Buffers that older checkpoints hold and nobody needs: a model computes them, vLLM's loader skips
# them (vllm/model_executor/models/utils.py:AutoWeightsLoader), no learner publishes them.
DEAD_BUFFERS = (
    "rotary_pos_emb.inv_freq",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def register() -> None:
    """The `vllm.general_plugins` entry point: make the backend known. Called in every process of
    vLLM, maybe twice.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # EngineCore and workers, when below the guard of process/guard.py: they survive their parent
    # otherwise, where the guard is killed too.
    if "MEGATRON_RL_GUARDED" in os.environ and multiprocessing.parent_process() is not None:
        die_with_parent()

    if WEIGHT_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_BACKEND, "megatron_rl.sync.engine_side.plugin", "SharedMemoryEngine"
        )


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of `/init_weight_transfer_engine`."""

    segment: dict[str, Any] = field(default_factory=dict)  # SegmentAddress
    bucket_bytes: int = 0
    num_tensors: int = 0
    first_slot: int = 0  # the receipts of worker r stand in slot first_slot + r


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of `/update_weights`: first the manifest, then one bucket a call; or `abandon`, the
    sender's reason.
    """

    manifest: dict[str, Any] | None = None
    bucket: dict[str, Any] | None = None
    abandon: str | None = None


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One per vLLM worker. Every worker reads all bytes; vLLM's own loaders take the worker's shard
    of them.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        self._expected = checkpoint_specs(self.model_config)
        self._segment: Segment | None = None
        self._init: InitInfo | None = None
        self._assembly: Assembly | None = None
        self._poison: str | None = None
        if device.type == "cpu":
            from megatron_rl.sync.engine_side.reload import keep_int8_scales_alive

            keep_int8_scales_alive(model)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        address = SegmentAddress(**init_info.segment)
        if self._segment is None or self._segment.address != address:
            self._close_segment()
            self._segment = Segment.open(address)
        self._init = init_info

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        from megatron_rl.sync.engine_side.reload import discard_partial_reload

        if self._segment is None:
            raise SyncError(
                "start: expected /init_weight_transfer_engine before it, got no shared memory"
            )
        if self._poison is not None:
            discard_partial_reload(self.model)
        self._assembly = None
        self._poison = "its update has not finished"
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException as error:
            self._poison = f"its update failed: {error}"
            raise
        if self.device.type != "cpu":  # the base class asks for an accelerator that a CPU lacks
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.abandon is not None:
            raise SyncError(f"the sender gave the update up: {update_info.abandon}")
        if update_info.manifest is not None:
            self._begin(update_info.manifest)
        elif update_info.bucket is not None:
            self._load(update_info.bucket)
        else:
            raise SyncError("update: expected a manifest, a bucket or abandon, got none of them")

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._assembly is None:
            raise SyncError(f"finish: expected a manifest and its tensors before, {self._poison}")
        self._assembly.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            from megatron_rl.sync.engine_side.reload import repack_experts, repack_tied_head

            if self._is_tied:
                repack_tied_head(self.model)
            repack_experts(self.model)
        self._assembly, self._poison = None, None

    def shutdown(self) -> None:
        self._close_segment()

    @property
    def _is_tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))

    def _begin(self, value: dict[str, Any]) -> None:
        if self._assembly is not None:
            raise SyncError("update: expected buckets after the manifest, got a second manifest")
        manifest = manifest_from_json(value)
        check_manifest(manifest, self._expected)
        if len(manifest.specs) != self._init.num_tensors:
            raise SyncError(
                f"manifest: expected {self._init.num_tensors} tensors, got {len(manifest.specs)}"
            )
        self._assembly = Assembly(manifest, self._read, self._acknowledge)

    def _load(self, value: dict[str, Any]) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        if self._assembly is None:
            raise SyncError("update: expected the manifest before the first bucket, got a bucket")
        bucket, checksums = bucket_from_json(value)
        with disable_mtp_completeness_check():  # a bucket is never the whole model
            self.model.load_weights(
                (name, tensor.to(self.device))
                for name, tensor in self._assembly.tensors_of(bucket, checksums)
            )

    def _read(self, offset: int, nbytes: int) -> torch.Tensor:
        if offset < 0 or offset + nbytes > self._init.bucket_bytes:
            raise SyncError(
                f"bucket: expected bytes within {self._init.bucket_bytes}, "
                f"got {offset} to {offset + nbytes}"
            )
        return self._segment.bytes_of(offset, nbytes)

    def _acknowledge(self, index: int, digest: bytes) -> None:
        parallel = self.vllm_config.parallel_config
        slot = self._init.first_slot + parallel.data_parallel_index * parallel.world_size
        slot += parallel.rank
        start = self._init.bucket_bytes + DIGEST_BYTES * (slot * self._init.num_tensors + index)
        self._segment.bytes_of(start, DIGEST_BYTES).copy_(
            torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        )

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
        self._segment = None


def checkpoint_specs(model_config: Any) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of the checkpoint that the engine was started from: what an update
    must bring.

    A tied head is left out: vLLM takes it from the embedding; and so are DEAD_BUFFERS.
    """
    from megatron_rl.weights.huggingface import CheckpointReader

    reader = CheckpointReader(_checkpoint_folder(model_config))
    is_tied = getattr(model_config.hf_text_config, "tie_word_embeddings", False)
    specs = {}
    for name in reader.names:
        if name.endswith(DEAD_BUFFERS) or (is_tied and name.endswith("lm_head.weight")):
            continue
        shape = reader.shape(name)
        # An empty slice tells the dtype without reading the tensor; a scalar has no slices.
        sample = reader.read(name, 0, 0, 0) if shape else reader.read(name, None, 0, 0)
        specs[name] = TensorSpec(name=name, dtype=sample.dtype, shape=shape)
    return specs


def _checkpoint_folder(model_config: Any) -> Path:
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True)
    )
