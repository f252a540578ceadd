"""[vllm] The weight-transfer backend inside the engine.

vLLM calls it through its weight-transfer API (vllm/distributed/weight_transfer/base.py);
`sync/publish.py` writes the bodies of the calls and `sync/receive.py` reads them. After an update
the model holds all of the published weights. vLLM loads each layer in place as it arrives, so an
update cannot be undone. If an update ends early, the weights are incomplete, a finish fails, and
the next start first discards the state that vLLM keeps of the failed update.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_rl.process.lifetime import die_with_parent
from megatron_rl.records import WEIGHT_BACKEND
from megatron_rl.sync.receive import UpdateReceiver
from megatron_rl.sync.wire import TensorSpec


def register() -> None:
    """The `vllm.general_plugins` entry point, which registers the backend. vLLM calls it in each of
    its processes, in some of them twice.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # EngineCore and the workers run under the guard of process/guard.py. If the guard were killed
    # as well, they would survive their parent.
    if "MEGATRON_RL_GUARDED" in os.environ and multiprocessing.parent_process() is not None:
        die_with_parent()

    if WEIGHT_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            WEIGHT_BACKEND, "megatron_rl.sync.engine_side.plugin", "WeightReceiver"
        )


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of `/init_weight_transfer_engine`."""

    transport: str = ""  # the name of a module in sync/transports/
    num_tensors: int = 0  # in the update that follows
    offer: dict[str, Any] = field(default_factory=dict)  # made by the transport's Sender


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of `/update_weights`: first the manifest, then one bucket per call; or `abandon`, the
    reason why the sender abandons the update.
    """

    manifest: dict[str, Any] | None = None
    bucket: dict[str, Any] | None = None
    abandon: str | None = None


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The backend of one vLLM worker. Every worker receives all tensors; vLLM's own loaders extract
    the worker's shard of each.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        parallel = vllm_config.parallel_config
        self._is_tied = is_tied(model, self.model_config)
        self._update = UpdateReceiver(
            checkpoint_specs(self.model_config, is_tied=self._is_tied),
            worker=parallel.data_parallel_index * parallel.world_size + parallel.rank,
            device=device,
        )
        if device.type == "cpu":
            from megatron_rl.sync.engine_side.reload import keep_int8_scales_alive

            keep_int8_scales_alive(model)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to the sender; called before each update."""
        self._update.connect(init_info.transport, init_info.num_tensors, init_info.offer)

    def start_weight_update(self) -> None:
        """Prepare vLLM to load each layer again."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        from megatron_rl.sync.engine_side.reload import discard_partial_reload

        is_broken = self._update.is_incomplete
        self._update.start()
        if is_broken:
            discard_partial_reload(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load the tensors of one call."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class would synchronise on the CPU too, and fail
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Like `update_weights`, but without waiting for the device."""
        self._update.update(
            manifest=update_info.manifest,
            bucket=update_info.bucket,
            abandon=update_info.abandon,
            load=self._load,
        )

    def finish_weight_update(self) -> None:
        """Make vLLM finish the reload after every tensor has arrived.

        If a tensor is missing, raises SyncError and leaves the weights incomplete.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._update.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            from megatron_rl.sync.engine_side.reload import repack_experts, repack_tied_head

            if self._is_tied:
                repack_tied_head(self.model)
            repack_experts(self.model)
        self._update.complete()

    def shutdown(self) -> None:
        """Disconnect from the sender."""
        self._update.close()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with disable_mtp_completeness_check():  # a bucket is never the whole model
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in tensors)


def is_tied(model: Any, model_config: Any) -> bool:
    """Whether the head is the embedding. A config that says so is overruled by vLLM where the
    checkpoint holds a head, and confirmed again where that head equals the embedding
    (vllm/model_executor/model_loader/weight_tying.py).
    """
    if getattr(model_config.hf_text_config, "tie_word_embeddings", False):
        return True
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head = parameters.get("lm_head.weight")
    return head is not None and head is parameters.get("model.embed_tokens.weight")


def checkpoint_specs(model_config: Any, *, is_tied: bool) -> dict[str, TensorSpec]:
    """Dtypes and shapes of the tensors that an update must contain, by name. They are those of the
    checkpoint from which the engine was started.

    DEAD_BUFFERS are left out, and so is a tied head, which vLLM takes from the embedding.
    """
    from megatron_rl.weights.huggingface import DEAD_BUFFERS, CheckpointReader

    reader = CheckpointReader(_checkpoint_folder(model_config))
    specs = {}
    for name in reader.names:
        if name.endswith(DEAD_BUFFERS) or (is_tied and name.endswith("lm_head.weight")):
            continue
        shape = reader.shape(name)
        # An empty slice gives the dtype without reading any data; a scalar cannot be sliced.
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
