"""`python -m tests.plan.support.vllm_slices MODEL WORKERS` prints the bytes that each worker of an
engine takes from the tensors of a checkpoint in float32, as JSON: the recording that
vllm/distributed/weight_transfer/sharded_rdt_engine.py makes of the model's own loaders.
"""

from __future__ import annotations

import json
import math
import os
import sys
from types import SimpleNamespace
from typing import Any

ITEM_BYTES = 4
TAKEN = "taken: "  # how the line begins that is printed


def taken(worker: Any, names: list[str], shapes: list[list[int]]) -> int:
    """Run in a worker: the bytes of its slices, each once."""
    from vllm.distributed.weight_transfer.sharded_rdt_engine import ShardedRDTWeightTransferEngine

    recorder = object.__new__(ShardedRDTWeightTransferEngine)  # without Ray, which it starts
    recorder.__dict__.update(
        model=worker.model_runner.model,
        device=worker.device,
        vllm_config=worker.vllm_config,
        model_config=worker.vllm_config.model_config,
        parallel_config=worker.vllm_config.parallel_config,
        _name_to_plan={},
        _live_names=set(),
        _name_meta={},
    )
    recorder._bake(
        SimpleNamespace(names=names, dtype_names=["float32"] * len(names), shapes=shapes)
    )
    missing = [name for name in names if name not in recorder._name_to_plan]
    assert not missing, f"not recorded: {missing}"
    slices = {copy.src: copy for copies in recorder._name_to_plan.values() for copy in copies}
    return sum(ITEM_BYTES * math.prod(copy.shape) for copy in slices.values())


def main(folder: str, num_workers: int) -> None:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="|".join("0" * num_workers),  # all on one core
        HF_HUB_OFFLINE="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from safetensors import safe_open
    from vllm import LLM

    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.endswith("inv_freq")]  # noqa: SIM118
        shapes = [list(file.get_slice(name).get_shape()) for name in names]
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        tensor_parallel_size=num_workers,
    )
    print(TAKEN + json.dumps(llm.collective_rpc(taken, args=(names, shapes))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
