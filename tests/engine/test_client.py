"""The client against a real vLLM server, and against a server that fails as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine.client import (
    RolloutClient,
    rollout_from_choice,
    sampling_seed,
)
from megatron_rl.engine.server import Engine
from megatron_rl.errors import EngineError
from megatron_rl.records import MAX_SAMPLES, EngineAddress, Prompt, RolloutGroup


def prompt(index: int, token_ids: Sequence[int] = (1, 20, 14, 21, 32)) -> Prompt:
    return Prompt(index=index, source="sum", text="4+5=", token_ids=tuple(token_ids), answer="9")


def client_of(engine: Engine, config: RolloutConfig | None = None) -> RolloutClient:
    return RolloutClient(
        [engine.address], config or RolloutConfig(), decode=str, check=engine.check
    )


def tokens_of(groups: Sequence[RolloutGroup]) -> dict[int, list[tuple[int, ...]]]:
    return {group.prompt.index: [r.token_ids for r in group.rollouts] for group in groups}


SAMPLING = SamplingConfig(max_tokens=12)


def test_rollouts_from_a_real_engine(engine: Engine, tiny_checkpoint) -> None:
    prompts = [prompt(index, (1, 20 + index, 14)) for index in range(6)]
    seeds = [sampling_seed(0, 0, p.index) for p in prompts]
    groups = client_of(engine).generate(prompts, SAMPLING, num_samples=4, seeds=seeds)
    assert [group.prompt for group in groups] == prompts
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for group in groups:
        assert len(group.rollouts) == 4
        assert len({rollout.token_ids for rollout in group.rollouts}) == 4
        for rollout in group.rollouts:
            assert rollout.token_ids[:3] == group.prompt.token_ids
            assert rollout.loss_mask[:3] == (False,) * 3 and all(rollout.loss_mask[3:])
            response = rollout.token_ids[3:]
            assert rollout.weight_versions == (-1,) * 3 + (0,) * len(response)
            assert rollout.text == str(response)
            ended = response[-1] == model.config.eos_token_id
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert len(response) == 12 or ended
            with torch.no_grad():
                logits = model(torch.tensor([rollout.token_ids])).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor([rollout.token_ids[1:]]).T)
            seen = torch.tensor(rollout.rollout_logprobs[3:])
            torch.testing.assert_close(seen, expected[2:, 0], atol=2e-5, rtol=2e-5)


def test_samples_do_not_depend_on_batch_mates(engine: Engine) -> None:
    prompts = [prompt(index, (1, 20 + index % 7, 14, 5)) for index in range(24)]
    seeds = [sampling_seed(3, 7, p.index) for p in prompts]
    client = client_of(engine)
    together = tokens_of(client.generate(prompts, SAMPLING, num_samples=8, seeds=seeds))
    turned = tokens_of(client.generate(prompts[::-1], SAMPLING, num_samples=8, seeds=seeds[::-1]))
    alone = tokens_of(client.generate(prompts[:1], SAMPLING, num_samples=8, seeds=seeds[:1]))
    fewer = tokens_of(client.generate(prompts[:1], SAMPLING, num_samples=2, seeds=seeds[:1]))
    assert together == turned
    assert alone[0] == together[0]
    assert fewer[0] == together[0][:2]
    other = [sampling_seed(3, 8, p.index) for p in prompts]
    again = tokens_of(client.generate(prompts, SAMPLING, num_samples=8, seeds=other))
    assert all(again[index] != together[index] for index in again)


def test_truncating_settings_reach_the_sampler(engine: Engine) -> None:
    greedy = SamplingConfig(max_tokens=4, top_k=1)
    [group] = client_of(engine).generate([prompt(0)], greedy, num_samples=4, seeds=[256])
    assert len({rollout.token_ids for rollout in group.rollouts}) == 1
    # Processed log-probs: all of the mass is on the one token that top-k left.
    assert {r.rollout_logprobs[-1] for r in group.rollouts} == {0.0}


def test_a_prompt_longer_than_the_context_is_one_clear_error(engine: Engine) -> None:
    long = prompt(5, [1] * 300)
    with pytest.raises(EngineError, match=r"prompt 5: status 400.*maximum model length of 256"):
        client_of(engine).generate([long], SAMPLING, num_samples=1, seeds=[0])


def test_a_wrong_token_is_one_clear_error(engine: Engine) -> None:
    address = EngineAddress(url=engine.address.url, token="wrong")
    client = RolloutClient([address], RolloutConfig(), decode=str, check=engine.check)
    with pytest.raises(EngineError, match=r"status 401: .*expected the run's token"):
        client.generate([prompt(0)], SAMPLING, num_samples=1, seeds=[0])


def test_seeds_leave_room_for_samples() -> None:
    for step in range(3):
        seeds = [sampling_seed(11, step, index) for index in range(2000)]
        assert all(0 <= seed < 2**63 for seed in seeds)
        # A CPU generator reads the low 32 bits only.
        generator = torch.Generator()
        low = [seed % 2**32 for seed in seeds]
        first = [torch.rand(1, generator=generator.manual_seed(s)) for s in (seeds[0], low[0])]
        assert first[0] == first[1]
        taken = {(seed + sample) % 2**32 for seed in seeds for sample in (0, MAX_SAMPLES - 1)}
        assert len(taken) == 2 * len(seeds)
        rows = sorted(low)
        assert all(b - a >= MAX_SAMPLES for a, b in pairwise(rows))
    assert sampling_seed(11, 0, 5) == sampling_seed(11, 0, 5)
    assert len({sampling_seed(run, step, 5) for run in range(9) for step in range(9)}) == 81


def choice(**changes: Any) -> dict[str, Any]:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 2, "logprob": -0.25}]
    return {
        "index": 0,
        "token_ids": [7, 2],
        "finish_reason": "stop",
        "logprobs": {"content": content},
        "weight_versions": [{"version": "default", "start": 0, "end": 2}],
    } | changes


def test_versions_are_kept_per_token() -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    rollout = rollout_from_choice(prompt(0, (1, 9)), choice(weight_versions=spans), str, "")
    assert rollout.weight_versions == (-1, -1, 3, 4)
    assert rollout.rollout_logprobs == (0.0, 0.0, -0.5, -0.25)


@pytest.mark.parametrize(
    "spans",
    [
        None,
        [],
        [{"version": "v3", "start": 0, "end": 2}],
        [{"version": "3", "start": 0, "end": 1}],
        [{"version": "3", "start": 1, "end": 2}],
    ],
)
def test_versions_that_do_not_cover_the_tokens(spans) -> None:
    with pytest.raises(EngineError, match=r"engine A: expected (the )?weight versions"):
        rollout_from_choice(prompt(0), choice(weight_versions=spans), str, "engine A")


@pytest.mark.parametrize("logprob", [-9999.0, -10000.0, float("nan"), 2e-3, None])
def test_a_logprob_that_is_none_is_an_error(logprob) -> None:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 2, "logprob": logprob}]
    with pytest.raises(EngineError, match=r"engine A, response token 1 \(id 2\): expected a log-"):
        rollout_from_choice(prompt(0), choice(logprobs={"content": content}), str, "engine A")


def test_missing_logprobs_are_an_error() -> None:
    content = [{"token_id": 7, "logprob": -0.5}]
    with pytest.raises(EngineError, match="1 log-probs for 2 tokens"):
        rollout_from_choice(prompt(0), choice(logprobs={"content": content}), str, "engine A")


class Failing:
    """A local server that answers each request as the next entry of `answers` says."""

    def __init__(self, answers: list[tuple[int, dict[str, Any]] | str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.num_in_flight = self.max_in_flight = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                length = int(handler.headers["content-length"])
                body = json.loads(handler.rfile.read(length))
                with lock:
                    self.requests.append(body)
                    answer = answers[min(len(self.requests), len(answers)) - 1]
                    self.num_in_flight += 1
                    self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
                if answer == "hang":
                    time.sleep(3)
                elif answer != "reset":  # else the connection closes without an answer
                    time.sleep(0.05)
                    content = json.dumps(answer[1]).encode()
                    handler.send_response(answer[0])
                    handler.send_header("content-length", str(len(content)))
                    handler.end_headers()
                    handler.wfile.write(content)
                with lock:
                    self.num_in_flight -= 1

            def log_message(handler, *ignored) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.address = EngineAddress(url=url, token="t")

    def client(self, check: Callable[[], None] = lambda: None, **config: Any) -> RolloutClient:
        return RolloutClient([self.address], RolloutConfig(**config), decode=str, check=check)


@pytest.fixture
def failing() -> Iterator[Callable[..., Failing]]:
    started: list[Failing] = []

    def start(*answers) -> Failing:
        started.append(Failing(list(answers)))
        return started[-1]

    yield start
    for server in started:
        server.server.shutdown()
        server.server.server_close()


GOOD = (200, {"choices": [choice()]})
ABORTED = (200, {"choices": [choice(finish_reason="abort")]})
BROKEN = (500, {"error": {"message": "engine hiccup"}})
POISONED = (503, {"error": {"type": "weights_poisoned", "message": "an update was left"}})


def test_failures_that_pass_are_tried_again(failing) -> None:
    server = failing(BROKEN, "reset", ABORTED, GOOD)
    [group] = server.client().generate([prompt(0)], SAMPLING, num_samples=1, seeds=[512])
    assert group.rollouts[0].token_ids[-2:] == (7, 2)
    assert len(server.requests) == 4
    assert all(request == server.requests[0] for request in server.requests)
    assert server.requests[0]["sampling_params"]["seed"] == 512


def test_failures_that_stay_end_in_one_error(failing) -> None:
    server = failing(BROKEN)
    with pytest.raises(EngineError, match=r"prompt 4: failed 2 times .*engine hiccup"):
        server.client(max_retries=1).generate([prompt(4)], SAMPLING, num_samples=1, seeds=[0])
    assert len(server.requests) == 2


def test_a_poisoned_engine_is_not_asked_again(failing) -> None:
    server = failing(POISONED)
    with pytest.raises(EngineError, match="weights_poisoned"):
        server.client().generate([prompt(0)], SAMPLING, num_samples=1, seeds=[0])
    assert len(server.requests) == 1


def test_no_answer_in_time_is_an_error(failing) -> None:
    client = failing("hang").client(request_timeout_seconds=0.5)
    with pytest.raises(EngineError, match=r"rollout\.request_timeout_seconds=0\.5"):
        client.generate([prompt(0)], SAMPLING, num_samples=1, seeds=[0])


def test_a_death_is_told_while_requests_hang(failing) -> None:
    died_at = time.monotonic() + 0.7

    def check() -> None:
        if time.monotonic() > died_at:
            raise EngineError("engine 0: ended by SIGKILL")

    with pytest.raises(EngineError, match="ended by SIGKILL"):
        failing("hang").client(check).generate([prompt(0)], SAMPLING, num_samples=1, seeds=[0])
    assert time.monotonic() - died_at < 1.0


def test_too_few_samples_are_an_error(failing) -> None:
    with pytest.raises(EngineError, match="expected 2 samples for prompt 0, got 1"):
        failing(GOOD).client().generate([prompt(0)], SAMPLING, num_samples=2, seeds=[0])


def test_requests_in_flight_are_bounded_and_spread_over_engines(failing) -> None:
    servers = [failing(GOOD), failing(GOOD)]
    config = RolloutConfig(max_in_flight=3)
    client = RolloutClient(
        [server.address for server in servers], config, decode=str, check=lambda: None
    )
    prompts = [prompt(index, (1, index)) for index in range(10, 30)]
    groups = client.generate(prompts, SAMPLING, num_samples=1, seeds=list(range(20)))
    assert [group.prompt.index for group in groups] == list(range(10, 30))
    for parity, server in enumerate(servers):
        asked = sorted(request["token_ids"][1] for request in server.requests)
        assert asked == list(range(10 + parity, 30, 2))
        assert 1 < server.max_in_flight <= 3
