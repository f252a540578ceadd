"""`python -m tests.support.hash_engine PORT MODEL EVENTS`: an engine whose answers are a hash of
the request and of the weights that were published to it, behind the real gate and the real receiver
of weights. It answers equally whatever else it is asked at the same time, which vLLM does only up
to the rounding of log-probs; so runs on it can be compared bit by bit.

Every request appends a line to EVENTS: `update`, or `generate` with the prompt's tokens. An answer
takes ANSWER_SECONDS.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from safetensors import safe_open
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_rl.engine.gate import Gate
from megatron_rl.process.lifetime import die_with_parent
from megatron_rl.sync.receive import UpdateReceiver
from megatron_rl.sync.wire import TensorSpec

ANSWER_SECONDS = 0.05
FIRST_TOKEN, LAST_TOKEN, END_TOKEN = 3, 97, 2
END_PROBABILITY = 0.05


class HashEngine:
    """The routes of vLLM that a run calls.

    Args:
        model: a checkpoint with the tensors that an update must contain.
    """

    def __init__(self, model: Path, events: Path) -> None:
        self._events = events
        expected = {}
        with safe_open(model / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118, a safetensors file is no dict
                shape = tuple(file.get_slice(name).get_shape())
                expected[name] = TensorSpec(name=name, dtype=torch.float32, shape=shape)
        self._receiver = UpdateReceiver(expected, worker=0, device=torch.device("cpu"))
        self._weights: dict[str, bytes] = {}
        self._digest, self._version = b"", "default"

    async def anything(self, request: Request) -> Response:
        """The routes that change nothing here."""
        return JSONResponse({"success": True, "is_paused": False, "world_size": 1})

    async def initialize(self, request: Request) -> Response:
        """`/init_weight_transfer_engine`."""
        self._receiver.connect(**(await request.json())["init_info"])
        return JSONResponse({})

    async def start(self, request: Request) -> Response:
        """`/start_weight_update`."""
        self._receiver.start()
        return JSONResponse({})

    async def update(self, request: Request) -> Response:
        """`/update_weights`."""
        self._note("update")
        body = {"manifest": None, "bucket": None, "abandon": None}
        body |= (await request.json())["update_info"]
        self._receiver.update(**body, load=self._load)
        return JSONResponse({})

    async def finish(self, request: Request) -> Response:
        """`/finish_weight_update`."""
        self._receiver.check_complete()
        self._receiver.complete()
        self._version = (await request.json())["weight_version"]
        self._digest = hashlib.sha256(repr(sorted(self._weights.items())).encode()).digest()
        return JSONResponse({})

    async def generate(self, request: Request) -> Response:
        """`/inference/v1/generate`."""
        body = await request.json()
        self._note(f"generate {body['token_ids']}")
        await asyncio.sleep(ANSWER_SECONDS)
        sampling = body["sampling_params"]
        choices = [
            self._choice(body["token_ids"], sampling["seed"] + index, sampling["max_tokens"], index)
            for index in range(sampling["n"])
        ]
        return JSONResponse({"choices": choices})

    def app(self) -> Starlette:
        """The server without its gate."""
        gets = ("/health", "/version", "/metrics", "/get_world_size", "/is_paused")
        posts = ("/pause", "/resume", "/reset_prefix_cache")
        routes = [Route(path, self.anything) for path in gets]
        routes += [Route(path, self.anything, methods=["POST"]) for path in posts]
        for path, call in (
            ("/init_weight_transfer_engine", self.initialize),
            ("/start_weight_update", self.start),
            ("/update_weights", self.update),
            ("/finish_weight_update", self.finish),
            ("/inference/v1/generate", self.generate),
        ):
            routes.append(Route(path, call, methods=["POST"]))
        return Starlette(routes=routes)

    def _load(self, tensors: Any) -> None:
        for name, tensor in tensors:
            self._weights[name] = hashlib.sha256(tensor.numpy().tobytes()).digest()

    def _choice(self, prompt: list[int], seed: int, max_tokens: int, index: int) -> dict[str, Any]:
        chance = random.Random(hashlib.sha256(repr((self._digest, prompt, seed)).encode()).digest())
        tokens: list[int] = []
        while len(tokens) < max_tokens and END_TOKEN not in tokens:
            is_end = chance.random() < END_PROBABILITY
            tokens.append(END_TOKEN if is_end else chance.randint(FIRST_TOKEN, LAST_TOKEN))
        content = [
            {"token_id": token, "logprob": _float32(-4 - chance.random())} for token in tokens
        ]
        return {
            "index": index,
            "token_ids": tokens,
            "finish_reason": "stop" if tokens[-1] == END_TOKEN else "length",
            "logprobs": {"content": content},
            "weight_versions": [{"version": self._version, "start": 0, "end": len(tokens)}],
        }

    def _note(self, what: str) -> None:
        with self._events.open("a") as file:
            file.write(f"{what}\n")


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


if __name__ == "__main__":
    die_with_parent()
    engine = HashEngine(Path(sys.argv[2]), Path(sys.argv[3]))
    uvicorn.run(Gate(engine.app()), port=int(sys.argv[1]), log_level="warning")
