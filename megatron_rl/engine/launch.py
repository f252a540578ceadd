"""Builds the command line and the environment of a stock vLLM server.

They follow from the rollout settings, a checkpoint, a port and the run's token; `engine/server.py`
starts the process. The token is passed in the environment, never on the command line, which every
user of the host can read.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence

import torch

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.engine.placement import VISIBLE_VARIABLE, visible_devices
from megatron_rl.engine.requests import num_requested_logprobs
from megatron_rl.process.interface import interface_of
from megatron_rl.process.loopback import HOST, INTERFACE, INTERFACE_VARIABLES
from megatron_rl.records import TOKEN_VARIABLE

UPDATE_TIMEOUT_VARIABLE = "MEGATRON_RL_UPDATE_TIMEOUT"
GATE = "megatron_rl.engine.gate.Gate"
DEFAULT_MAX_LOGPROBS = 20  # vLLM's, which a request may not exceed (vllm/config/model.py)
# Variables that torchrun sets for its ranks; an engine is not a rank and must not inherit them.
TORCHRUN_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|OMP_.*"
)


def server_command(
    config: RolloutConfig,
    *,
    model_path: str,
    port: int,
    seed: int,
    weight_backend: str | None,
    num_logprobs: int = 0,
    host: str = HOST,
    returns_routes: bool = False,
) -> list[str]:
    """The command line of one server.

    Args:
        seed: for the engine's own random state; every request for samples has its own seed.
        weight_backend: backend of vLLM's weight-transfer API; None if the weights never change.
        num_logprobs: K of the heads that requests may ask for; 0: they ask for none.
        host: the address that it listens on.
        returns_routes: whether answers have the experts of every token.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_path, "--host", host, "--port", str(port), "--seed", str(seed)]
    command += ["--dtype", config.dtype, "--kv-cache-dtype", config.kv_cache_dtype]
    command += ["--max-num-seqs", str(config.max_num_seqs)]
    command += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    command += ["--enable-prefix-caching", "--middleware", GATE]
    command += ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if num_requested_logprobs(num_logprobs) > DEFAULT_MAX_LOGPROBS:
        command += ["--max-logprobs", str(num_requested_logprobs(num_logprobs))]
    if config.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(config.tensor_parallel)]
    if returns_routes:
        command += ["--enable-return-routed-experts"]
    if config.max_model_len:
        command += ["--max-model-len", str(config.max_model_len)]
    if weight_backend is not None:
        command += ["--weight-transfer-config", json.dumps({"backend": weight_backend})]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
        if config.placement == "colocated":
            command += ["--enable-sleep-mode"]
    else:
        # Compilation adds half a minute to every start and gave no speed-up on small models. With
        # an explicit cache size vLLM skips its warm-up and does not require most of the host's
        # memory to be free.
        cache_bytes = int(config.kv_cache_gib * 2**30)
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(cache_bytes)]
        # After a partial prefill vLLM rewinds a seeded generator. CPU generators do not support
        # this, so the engine would die (vllm/v1/worker/gpu_model_runner.py, `gen.set_offset`).
        command += ["--no-enable-chunked-prefill"]
    return command + list(config.extra_args)


def server_environment(
    config: RolloutConfig,
    *,
    token: str,
    update_timeout_seconds: float,
    host: str = HOST,
    gpus: Sequence[int] = (),
) -> dict[str, str]:
    """The environment of one server: this process's environment without torchrun's variables, plus
    the token and the settings of vLLM that have no command-line option.

    Args:
        host: the address that it listens on; its processes talk to each other there, too.
        gpus: that it may use, among those that this process sees; empty: all of them.
    """
    interface = INTERFACE if host == HOST else interface_of(host)
    environment = {
        name: value for name, value in os.environ.items() if not TORCHRUN_VARIABLES.fullmatch(name)
    }
    environment.update(
        {
            TOKEN_VARIABLE: token,
            UPDATE_TIMEOUT_VARIABLE: str(update_timeout_seconds),
            "VLLM_SERVER_DEV_MODE": "1",  # enables the weight routes; the gate requires the token
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": host,  # nothing of an engine listens elsewhere
            **dict.fromkeys(INTERFACE_VARIABLES, interface),
            "PYTHONUNBUFFERED": "1",  # so that the last output of a dying server reaches its log
        }
    )
    if gpus:
        environment[VISIBLE_VARIABLE] = visible_devices(gpus)
    if not torch.cuda.is_available():
        num_cores = len(os.sched_getaffinity(0))
        # One core is left to the API server and the learner, as in vLLM's automatic choice.
        num_threads = config.num_threads or max(1, num_cores - 1)
        environment.update(
            {
                # The worker runs inside EngineCore, which saves a process and its 10 s of imports.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(num_threads),
            }
        )
        if config.tensor_parallel > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = _cores_of_workers(config.tensor_parallel)
        if num_threads * config.num_engines > num_cores:
            # Threads that spin at barriers would take the cores from the other engines. With a core
            # for each thread they sample 1.6 times as fast if they do spin, which they do for
            # milliseconds only.
            environment.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"})
    return environment


def _cores_of_workers(count: int) -> str:
    """An engine's cores for each of its workers, which vLLM wants to know if there are several."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[worker::count] or [cores[0]] for worker in range(count)]
    return "|".join(",".join(map(str, share)) for share in shares)
