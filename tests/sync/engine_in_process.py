"""Run by engine_side/test_plugin.py in a process of its own: real vLLM engines without a server.

python -m tests.sync.engine_in_process VARIANT FOLDER FOLDER [VARIANT FOLDER FOLDER ...]
prints a line of JSON per variant, with the log-probs that an engine gives a fixed text: freshly
loaded, and after updates.
"""

from __future__ import annotations

import math
import os

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory

from megatron_rl.config import SyncConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.errors import SyncError
from megatron_rl.records import WEIGHT_BACKEND
from megatron_rl.sync.engine_side import reload as cpu_reload
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream
from tests.sync.tiny_checkpoints import specs_of, stream_of, tensors_of

TEXT = torch.randint(3, 128, (96,), generator=torch.Generator().manual_seed(0)).tolist()


class InProcess:
    """What `EngineControl` does over HTTP, as calls of the engine itself; no request is ever in
    flight.
    """

    def __init__(self, llm: LLM) -> None:
        self.url = "in-process"
        self._llm = llm

    def world_size(self) -> int:
        return 1

    def is_paused(self) -> bool:
        return False

    def pause(
        self, *, mode: str = "wait", drain_seconds: float = 0.0, silence_seconds: float = math.inf
    ) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        pass

    def initialize(self, values: dict) -> None:
        self._llm.init_weight_transfer_engine({"init_info": values})

    def start(self) -> None:
        try:
            self._llm.start_weight_update()
        except RuntimeError as error:
            raise SyncError(str(error)) from error

    def update(self, phase: str, values: dict) -> None:
        self._llm.update_weights({"update_info": values})

    def abandon(self, reason: str) -> None:
        try:
            self._llm.update_weights({"update_info": {"abandon": reason}})
        except (SyncError, RuntimeError):
            return

    def finish(self, version: int) -> None:
        self._llm.finish_weight_update(weight_version=str(version))

    def reset_prefix_cache(self, *, with_running: bool = False) -> None:
        assert self._llm.reset_prefix_cache()


def load(folder: Path, dtype: str) -> LLM:
    return LLM(
        model=str(folder),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=WEIGHT_BACKEND),
    )


def logprobs(llm: LLM) -> list[float]:
    """Of every token of TEXT but the first, from one prefill."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": TEXT}], sampling, use_tqdm=False)
    return [entry[token].logprob for token, entry in zip(TEXT[1:], output.prompt_logprobs[1:])]


def publish(publisher: Publisher, folder: Path, version: int) -> None:
    publisher.publish(stream_of(tensors_of(folder)), version=version)


def publish_half(publisher: Publisher, folder: Path) -> str:
    """Stop in the middle of a layer, after a part of its qkv tensors. Returns the error."""
    tensors = tensors_of(folder)
    specs = specs_of(tensors)
    stop = next(i for i, spec in enumerate(specs) if "layers.1.self_attn.q_proj" in spec.name)
    half = WeightStream(specs=tuple(specs), tensors=list(tensors.items())[: stop + 1])
    try:
        publisher.publish(half, version=99)
    except SyncError as error:
        return str(error)
    raise AssertionError("half an update went through")


def exercise(variant: str, first: Path, second: Path) -> dict[str, list[float] | str]:
    """Log-probs of an engine freshly loaded from each folder, and of one that was updated."""
    dtype = "bfloat16" if variant in ("bfloat16", "int8") else "float32"
    result = {}
    llm = load(second, dtype)
    result["fresh_second"] = logprobs(llm)
    unload(llm)
    llm = load(first, dtype)
    result["fresh_first"] = logprobs(llm)
    # Buckets of 20 KiB: the embedding is split, and a layer comes in several calls.
    config = SyncConfig(bucket_mib=20 / 1024)
    address = EngineAddress(url="in-process", token="unused")
    engine = InProcess(llm)
    with Publisher([address], config, wire_dtype=None, control=lambda *_: engine) as publisher:
        publish(publisher, second, 1)
        result["second"] = logprobs(llm)
        publish(publisher, first, 2)
        result["first"] = logprobs(llm)
        result["half"] = publish_half(publisher, second)
        result["finish_after_half"] = finish_without_start(llm)
        publish(publisher, second, 3)
        result["healed"] = logprobs(llm)
        publish(publisher, first, 4)
        result["after_healing"] = logprobs(llm)
        with without_repairs():
            publish(publisher, second, 5)
            result["without_repairs"] = logprobs(llm)
    unload(llm)
    return result


@contextmanager
def without_repairs() -> Iterator[None]:
    """Stock vLLM, which packs neither a tied head nor experts again after a reload."""
    names = ("repack_tied_head", "repack_experts")
    repairs = [getattr(cpu_reload, name) for name in names]
    for name in names:
        setattr(cpu_reload, name, lambda model: None)
    yield
    for name, repair in zip(names, repairs):
        setattr(cpu_reload, name, repair)


def finish_without_start(llm: LLM) -> str:
    try:
        llm.finish_weight_update()
    except RuntimeError as error:
        return str(error)
    return "accepted"


def unload(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    for name, first, second in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
        found = exercise(name, Path(first), Path(second))
        print("RESULT " + json.dumps({"variant": name} | found), flush=True)
