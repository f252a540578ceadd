"""The publisher against one real vLLM server behind its gate, compared with transformers in
float32.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config import SyncConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.http import EngineControl
from megatron_rl.errors import SyncError
from megatron_rl.sync.probe import Precisions, compare
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.source import WeightStream
from tests.sync.faulty_sender import send
from tests.sync.served import UPDATE_TIMEOUT
from tests.sync.tiny_checkpoints import specs_of, stream_of, tensors_of

CONFIG = SyncConfig(bucket_mib=0.25, timeout_seconds=20.0)
# More than two blocks of the prefix cache, which are 128 tokens each on the CPU.
PROMPT = torch.randint(3, 128, (270,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def publisher(address: EngineAddress) -> Iterator[Publisher]:
    with Publisher([address], CONFIG, wire_dtype=None) as publisher:
        yield publisher


class Sleeper:
    """An engine that neither sleeps nor wakes up, or does."""

    def __init__(self, address: EngineAddress) -> None:
        self.url = address.url

    def sleep(self) -> None:
        if "bad" in self.url:
            raise SyncError(f"engine {self.url}: no answer")

    wake = sleep

    def close(self) -> None:
        pass


@pytest.mark.parametrize("call", ["sleep", "wake"])
def test_engines_that_do_not_fall_asleep_are_told(call: str) -> None:
    urls = ("http://bad", "http://good", "http://bad-and-left-out")
    addresses = [EngineAddress(url=url, token="t") for url in urls]
    control: Any = lambda address, _: Sleeper(address)  # noqa: E731
    with Publisher(addresses, CONFIG, wire_dtype=None, control=control) as publisher:
        found = getattr(publisher, call)(urls[:2])
    assert found == {"http://bad": "engine http://bad: no answer"}


def client_of(address: EngineAddress) -> httpx.Client:
    headers = {"Authorization": f"Bearer {address.token}"}
    return httpx.Client(base_url=address.url, headers=headers, timeout=30.0, trust_env=False)


def generate(client: httpx.Client, num_tokens: int = 32, samples: int = 4) -> httpx.Response:
    sampling = {"n": samples, "temperature": 1.0, "max_tokens": num_tokens, "logprobs": 0}
    sampling["ignore_eos"] = True
    return client.post(
        "/inference/v1/generate", json={"token_ids": PROMPT, "sampling_params": sampling}
    )


def worst_gap(answer: httpx.Response, folder: Path, version: str) -> float:
    """Largest |difference of log-probs| / max(1, |logprob|) between the answer and transformers."""
    assert answer.status_code == 200, answer.text
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gap = 0.0
    for choice in answer.json()["choices"]:
        assert {span["version"] for span in choice["weight_versions"]} == {version}
        tokens = choice["token_ids"]
        rollout = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
        full = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        precisions = Precisions(engine="float32", learner="float32", tolerance=0.0)
        report = compare([rollout], [full], precisions)
        gap = max(gap, report.max_relative_logprob_gap)
    return gap


def publish(publisher: Publisher, folder: Path, version: int):
    return publisher.publish(stream_of(tensors_of(folder)), version=version)


def assert_poisoned_then_heal(publisher: Publisher, address: EngineAddress, folder: Path) -> None:
    with client_of(address) as client:
        refused = generate(client)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "weights_poisoned"
        assert client.get("/is_paused").json()["is_paused"]
        publish(publisher, folder, 50)
        assert worst_gap(generate(client), folder, "50") <= 2e-5


def test_three_updates_serve_what_was_published(publisher, address, folders):
    with client_of(address) as client:
        for version, folder in ((1, folders[1]), (2, folders[2]), (3, folders[1])):
            report = publish(publisher, folder, version)
            assert worst_gap(generate(client), folder, str(version)) <= 2e-5
            assert report.received == {address.url: (report.checksum,)}
            assert list(report.checksums) == list(tensors_of(folder))
            assert report.num_buckets > 3


def test_same_weights_have_the_same_checksums(publisher, folders):
    first, second = publish(publisher, folders[1], 1), publish(publisher, folders[1], 2)
    other = publish(publisher, folders[2], 3)
    assert first.checksums == second.checksums and first.checksum == second.checksum
    assert other.checksum != first.checksum


def test_cast_on_the_way(address, folders):
    tensors = tensors_of(folders[1])
    with Publisher([address], CONFIG, wire_dtype=torch.bfloat16) as publisher:
        report = publisher.publish(stream_of(tensors), version=4)
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values()) // 2
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    with Publisher([address], CONFIG, wire_dtype=None) as publisher:
        assert publisher.publish(stream_of(rounded), version=5).checksum == report.checksum


def test_requests_in_flight_end_under_the_old_version(publisher, address, folders):
    publish(publisher, folders[1], 6)
    with client_of(address) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, client, num_tokens=200, samples=16)
        time.sleep(0.3)
        assert not answer.done()
        publish(publisher, folders[2], 7)
        in_flight = answer.result()
        assert worst_gap(in_flight, folders[1], "6") <= 2e-5
        assert min(len(choice["token_ids"]) for choice in in_flight.json()["choices"]) == 200
        assert worst_gap(generate(client), folders[2], "7") <= 2e-5


def test_a_paused_engine_answers_nothing(publisher, address, folders):
    """So the parity probe cannot stand before resume."""
    publish(publisher, folders[1], 8)
    control = EngineControl(address, 20.0)
    with client_of(address) as client:
        control.pause()
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/inference/v1/generate",
                json={"token_ids": PROMPT, "sampling_params": {"max_tokens": 1}},
                timeout=1.0,
            )
        control.resume()
        assert worst_gap(generate(client), folders[1], "8") <= 2e-5
    control.close()


@pytest.mark.parametrize("fault", ["missing name", "unknown name", "twice", "shape", "dtype"])
def test_a_wrong_manifest_is_refused(publisher, address, folders, fault):
    tensors = tensors_of(folders[2])
    if fault == "missing name":
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        expected = "model.layers.1.mlp.up_proj.weight"
    elif fault == "unknown name":
        tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(256)  # vLLM would skip it
        expected = "unknown name"
    elif fault == "shape":
        tensors["model.norm.weight"] = torch.zeros(1)
        expected = "model.norm.weight: expected shape"
    elif fault == "dtype":
        tensors["model.norm.weight"] = torch.zeros(128, dtype=torch.int8)
        expected = "expected float32, got int8"
    specs, items = specs_of(tensors), list(tensors.items())
    if fault == "twice":
        specs, items = [*specs, specs[-1]], [*items, items[-1]]
        expected = "expected each name once"
    with pytest.raises(SyncError, match="manifest") as failure:
        publisher.publish(WeightStream(specs=tuple(specs), tensors=items), version=9)
    assert address.url in str(failure.value) and expected in str(failure.value)
    assert_poisoned_then_heal(publisher, address, folders[2])


def test_half_an_update_is_refused(publisher, address, folders):
    tensors = tensors_of(folders[2])
    half = list(tensors.items())[: len(tensors) // 2]
    with pytest.raises(SyncError, match="got the end"):
        publisher.publish(WeightStream(specs=tuple(specs_of(tensors)), tensors=half), version=9)
    assert_poisoned_then_heal(publisher, address, folders[2])


def test_a_learner_that_raises_half_way(publisher, address, folders):
    tensors = tensors_of(folders[2])

    def gather():
        for name, tensor in tensors.items():
            if name.startswith("model.layers.1"):
                raise RuntimeError("a rank died while gathering")
            yield name, tensor

    with pytest.raises(RuntimeError, match="a rank died"):
        publisher.publish(WeightStream(specs=tuple(specs_of(tensors)), tensors=gather()), version=9)
    assert_poisoned_then_heal(publisher, address, folders[2])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong checksum", r"bucket 2: .*expected checksum 0000"),
        ("torn bytes", r"bucket 2: .*expected checksum"),
        ("skipped bucket", r"bucket 3: .*expected number 2, got 3"),
        ("early finish", r"finish: .*the first that did not arrive"),
    ],
)
def test_a_faulty_sender_is_refused(publisher, address, folders, fault, message):
    with pytest.raises(SyncError, match=message):
        send(address, folders[2], fault)
    assert_poisoned_then_heal(publisher, address, folders[2])


def test_a_sender_killed_half_way(publisher, address, folders):
    publish(publisher, folders[1], 10)
    sender = subprocess.run(
        [sys.executable, "-m", "tests.sync.faulty_sender", address.url, str(folders[2]), "killed"],
        env={**os.environ, "MEGATRON_RL_TOKEN": address.token},
        cwd=Path(__file__).parents[2],
    )
    assert sender.returncode == -signal.SIGKILL
    with client_of(address) as client:
        assert generate(client).json()["error"]["type"] == "weights_updating"
        time.sleep(UPDATE_TIMEOUT + 0.5)
    assert_poisoned_then_heal(publisher, address, folders[2])


def test_a_dead_engine_is_named_in_time(folders):
    with socket.socket() as listener:  # accepts, and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        silent = EngineAddress(url=url, token="secret-token")
        begin = time.monotonic()
        with (
            Publisher([silent], SyncConfig(timeout_seconds=1.0), wire_dtype=None) as publisher,
            pytest.raises(SyncError, match=r"connect: expected an answer within 1\.0 s") as failure,
        ):
            publish(publisher, folders[1], 1)
        assert time.monotonic() - begin < 3.0
        assert url in str(failure.value) and "secret-token" not in str(failure.value)
