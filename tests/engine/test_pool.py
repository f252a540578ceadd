"""The pool against a real vLLM server, and against a server that fails as it is told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.engine.roster import Roster
from megatron_rl.engine.routing import Router
from megatron_rl.engine.server import Engine
from megatron_rl.errors import EngineError
from megatron_rl.rollout.seeds import sampling_seed
from tests.fakes.http_server import Answer, FakeServer

Completions = tuple[Completion, ...]
SAMPLING = SamplingConfig(max_tokens=12)


def pool_of(engine: Engine, config: RolloutConfig | None = None) -> HttpEnginePool:
    return HttpEnginePool([engine.address], config or RolloutConfig(), check=engine.check)


def request(
    key: int,
    *,
    token_ids: Sequence[int] = (1, 20, 14, 21, 32),
    num_samples: int = 1,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    num_logprobs: int = 0,
) -> GenerateRequest:
    return GenerateRequest(
        token_ids=tuple(token_ids),
        num_samples=num_samples,
        seed=seed,
        sampling=sampling,
        key=key,
        num_logprobs=num_logprobs,
    )


def generate(pool: HttpEnginePool, *requests: GenerateRequest) -> list[Completions]:
    return pool.run([partial(_generate, each) for each in requests])


async def _generate(one: GenerateRequest, sampler: Sampler) -> Completions:
    return await sampler.generate(one)


def tokens_of(completions: Completions) -> list[tuple[int, ...]]:
    return [each.token_ids for each in completions]


def test_samples_end_at_every_end_token_of_the_run(engine: Engine) -> None:
    """Which the engine does not know by its own files: eos is 2 there."""
    whole = generate(pool_of(engine), request(3, num_samples=8, seed=5))[0]
    end = next(each.token_ids[2] for each in whole if len(each.token_ids) == 12)
    pool = HttpEnginePool(
        [engine.address], RolloutConfig(), end_token_ids=(2, end), check=engine.check
    )
    cut = generate(pool, request(3, num_samples=8, seed=5))[0]
    for before, after in zip(whole, cut, strict=True):
        position = before.token_ids.index(end) if end in before.token_ids else None
        stop = len(before.token_ids) if position is None else position + 1
        assert after.token_ids == before.token_ids[:stop]
        assert position is None or after.finish_reason == "stop"


def test_completions_of_a_real_engine(engine: Engine, tiny_checkpoint) -> None:
    prompts = [(1, 20 + index, 14) for index in range(6)]
    answers = generate(
        pool_of(engine),
        *(
            request(index, token_ids=ids, num_samples=4, seed=sampling_seed(0, 0, index))
            for index, ids in enumerate(prompts)
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for ids, completions in zip(prompts, answers, strict=True):
        assert len(completions) == len(set(tokens_of(completions))) == 4
        for completion in completions:
            response = completion.token_ids
            assert completion.engine == engine.address.url
            assert completion.weight_versions == (0,) * len(response)
            ended = response[-1] == model.config.eos_token_id
            assert completion.finish_reason == ("stop" if ended else "length")
            assert len(response) == 12 or ended
            with torch.no_grad():
                logits = model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor([response]).T)[:, 0]
            seen = torch.tensor(completion.logprobs)
            torch.testing.assert_close(seen, expected, atol=2e-5, rtol=2e-5)


def test_heads_of_a_real_engine(engine: Engine, tiny_checkpoint) -> None:
    """Of the distribution that the engine samples from, whichever token it sampled."""
    asked = partial(request, 0, num_samples=4, seed=sampling_seed(0, 1, 0))
    [plain], [with_heads] = (
        generate(pool_of(engine), asked(num_logprobs=number)) for number in (0, 24)
    )
    # The samples, and their log-probs to the bit, do not depend on the heads.
    assert [replace(each, head=None) for each in with_heads] == list(plain)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    num_sampled_in_head = 0
    for completion in with_heads:
        prompt, response = list(asked().token_ids), list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).topk(24)
        found = torch.from_numpy(completion.head.logprobs)
        torch.testing.assert_close(found, expected.values, atol=2e-5, rtol=2e-5)
        ids = torch.from_numpy(completion.head.token_ids)
        assert (ids == expected.indices).float().mean() > 0.9  # but for near ties
        is_sampled = ids == torch.tensor(response)[:, None]
        own = torch.tensor(completion.logprobs, dtype=torch.float32)
        assert torch.equal(found[is_sampled], own[is_sampled.any(1)])
        num_sampled_in_head += int(is_sampled.sum())
    assert 0 < num_sampled_in_head < sum(len(each.token_ids) for each in with_heads)


def test_a_head_holds_the_whole_support_of_a_truncating_sampler(engine: Engine) -> None:
    sampling = SamplingConfig(max_tokens=6, temperature=0.7, top_k=5)
    [completions] = generate(
        pool_of(engine), request(0, num_samples=3, sampling=sampling, num_logprobs=8)
    )
    for completion in completions:
        head = completion.head
        assert (head.token_ids[:, :5] >= 0).all() and (head.token_ids[:, 5:] == -1).all()
        masses = torch.from_numpy(head.logprobs).double().exp().sum(1)
        assert (masses - 1).abs().max() < 1e-6
        for token, logprob, ids, logprobs in zip(
            completion.token_ids,
            completion.logprobs,
            head.token_ids.tolist(),
            head.logprobs.tolist(),
            strict=True,
        ):
            assert logprobs[ids.index(token)] == logprob


def test_scores_of_a_real_engine(engine: Engine, tiny_checkpoint) -> None:
    sequences = [(1, 20, 14, 33, 2), (5, 6), (1, 40, 41)]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for ids, scores in zip(sequences, pool_of(engine).score(sequences), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor([ids[1:]]).T)[:, 0]
        assert scores[0] == 0.0
        torch.testing.assert_close(torch.tensor(scores[1:]), expected, atol=2e-5, rtol=2e-5)


def test_samples_do_not_depend_on_batch_mates(engine: Engine) -> None:
    def requests(step: int) -> list[GenerateRequest]:
        return [
            request(
                index,
                token_ids=(1, 20 + index % 7, 14, 5),
                num_samples=8,
                seed=sampling_seed(3, step, index),
            )
            for index in range(24)
        ]

    pool, wanted = pool_of(engine), requests(7)
    together = [tokens_of(each) for each in generate(pool, *wanted)]
    turned = [tokens_of(each) for each in generate(pool, *wanted[::-1])]
    [alone] = generate(pool, wanted[0])
    [fewer] = generate(pool, replace(wanted[0], num_samples=2))
    assert together == turned[::-1]
    assert tokens_of(alone) == together[0]
    assert tokens_of(fewer) == together[0][:2]
    again = [tokens_of(each) for each in generate(pool, *requests(8))]
    assert all(new != old for new, old in zip(again, together, strict=True))


def test_truncating_settings_reach_the_sampler(engine: Engine) -> None:
    greedy = SamplingConfig(max_tokens=4, top_k=1)
    [completions] = generate(pool_of(engine), request(0, num_samples=4, seed=256, sampling=greedy))
    assert len(set(tokens_of(completions))) == 1
    # Processed log-probs: all of the mass is on the one token that top-k left.
    assert {each.logprobs[-1] for each in completions} == {0.0}


def test_a_prompt_longer_than_the_context_is_one_clear_error(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"prompt 5: status 400.*maximum model length of 256"):
        generate(pool_of(engine), request(5, token_ids=[1] * 300))


def test_a_wrong_token_is_one_clear_error(engine: Engine) -> None:
    address = EngineAddress(url=engine.address.url, token="wrong")
    pool = HttpEnginePool([address], RolloutConfig(), check=engine.check)
    with pytest.raises(EngineError, match=r"status 401: .*expected the run's token"):
        generate(pool, request(0))


def test_a_pool_needs_an_engine() -> None:
    with pytest.raises(EngineError, match="expected at least one engine"):
        HttpEnginePool([], RolloutConfig(), check=lambda: None)


def choice(**changes: Any) -> dict[str, Any]:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 2, "logprob": -0.25}]
    return {
        "index": 0,
        "token_ids": [7, 2],
        "finish_reason": "stop",
        "logprobs": {"content": content},
        "weight_versions": [{"version": "default", "start": 0, "end": 2}],
    } | changes


def pool_on(
    server: FakeServer, check: Callable[[], None] = lambda: None, **config: Any
) -> HttpEnginePool:
    return HttpEnginePool([server.address], RolloutConfig(**config), check=check)


@pytest.fixture
def failing() -> Iterator[Callable[..., FakeServer]]:
    started: list[FakeServer] = []

    def start(*answers: Answer) -> FakeServer:
        started.append(FakeServer(*answers))
        return started[-1]

    yield start
    for server in started:
        server.close()


GOOD = (200, {"choices": [choice()]})
ABORTED = (200, {"choices": [choice(finish_reason="abort")]})
BROKEN = (500, {"error": {"message": "engine hiccup"}})
POISONED = (503, {"error": {"type": "weights_poisoned", "message": "an update was left"}})


def test_failures_that_pass_are_tried_again(failing) -> None:
    server = failing(BROKEN, "reset", ABORTED, GOOD)
    [[completion]] = generate(pool_on(server), request(0, seed=512))
    assert completion.token_ids == (7, 2)
    assert completion.engine == server.address.url
    assert len(server.requests) == 4
    assert all(each == server.requests[0] for each in server.requests)
    assert server.requests[0]["sampling_params"]["seed"] == 512


def test_failures_that_stay_end_in_one_error(failing) -> None:
    server = failing(BROKEN)
    with pytest.raises(EngineError, match=r"prompt 4: failed 2 times .*engine hiccup"):
        generate(pool_on(server, max_retries=1), request(4))
    assert len(server.requests) == 2


def test_scores_are_tried_again_too(failing) -> None:
    scores = [None, {"9": {"logprob": -1.5}}]
    good = (200, {"choices": [choice()], "prompt_logprobs": scores})
    server = failing(BROKEN, good)
    assert pool_on(server).score([(1, 9)]) == [(0.0, -1.5)]
    with pytest.raises(EngineError, match=rf"engine {server.address.url}, sequence 0: expected 2"):
        pool_on(server).score([(1, 9, 4)])


def test_a_poisoned_engine_is_not_asked_again(failing) -> None:
    server = failing(POISONED)
    with pytest.raises(EngineError, match="weights_poisoned"):
        generate(pool_on(server), request(0))
    assert len(server.requests) == 1


def test_no_answer_in_time_is_an_error(failing) -> None:
    pool = pool_on(failing("hang"), request_timeout_seconds=0.5)
    with pytest.raises(EngineError, match=r"rollout\.request_timeout_seconds=0\.5"):
        generate(pool, request(0))


def test_a_death_is_told_while_requests_hang(failing) -> None:
    died_at = time.monotonic() + 0.7

    def check() -> None:
        if time.monotonic() > died_at:
            raise EngineError("engine 0: ended by SIGKILL")

    with pytest.raises(EngineError, match="ended by SIGKILL"):
        generate(pool_on(failing("hang"), check), request(0))
    assert time.monotonic() - died_at < 1.0


def test_a_death_is_told_instead_of_a_broken_connection(failing) -> None:
    """The connection breaks first; the guard notices the death of its server a moment later."""
    server = failing("reset")
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.8:
            raise EngineError("engine 0: exited with code 7")

    with pytest.raises(EngineError, match="exited with code 7"):
        generate(pool_on(server, check, max_retries=0), request(0))


def test_too_few_samples_are_an_error(failing) -> None:
    with pytest.raises(EngineError, match="expected 2 samples for prompt 0, got 1"):
        generate(pool_on(failing(GOOD)), request(0, num_samples=2))


def test_a_job_that_fails_ends_the_others(failing) -> None:
    server = failing("hang")
    ended = []

    async def fail(sampler: Sampler) -> None:
        await asyncio.sleep(0.2)
        raise ValueError("a bug of an environment")

    async def wait(sampler: Sampler) -> None:
        try:
            await sampler.generate(request(0))
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    began = time.monotonic()
    with pytest.raises(ValueError, match="a bug of an environment"):
        pool_on(server).run([wait, fail])
    assert ended == ["cancelled"] and time.monotonic() - began < 2


def test_nothing_to_do_is_done_at_once(failing) -> None:
    pool = pool_on(failing(GOOD))
    assert pool.run([]) == []
    assert pool.score([]) == []


def test_requests_in_flight_are_bounded_and_spread_over_engines(failing) -> None:
    servers = [failing(GOOD), failing(GOOD)]
    addresses = [server.address for server in servers]
    pool = HttpEnginePool(addresses, RolloutConfig(max_in_flight=3), check=lambda: None)
    assert pool.urls == tuple(address.url for address in addresses)
    keys = range(10, 30)
    answers = generate(pool, *(request(key, token_ids=(1, key)) for key in keys))
    engines = [completion.engine for [completion] in answers]
    assert engines[:6] == [*pool.urls] * 3  # in turn, as long as nothing is answered
    assert set(engines[6:]) == set(pool.urls)
    asked = [each["token_ids"][1] for server in servers for each in server.requests]
    assert sorted(asked) == [*keys]
    assert all(1 < server.max_in_flight <= 3 for server in servers)


def test_the_least_loaded_engine_comes_first_and_a_key_stays_with_its_engine() -> None:
    async def route() -> list[str]:
        clients = [SimpleNamespace(url=name) for name in "abc"]
        router = Router(clients, 2, 1, Roster("abc"))
        chosen = []
        async with AsyncExitStack() as stack:
            for key in (7, 8, 9, 7):  # "b", "c" and "a" in turn, and "b" again
                client = await stack.enter_async_context(router.client_of(key))
                chosen.append(client.url)
            async with router.client_of(10) as client:  # "c" and "a" have one, "b" two
                chosen.append(client.url)
            async with router.client_of(8) as client:
                chosen.append(client.url)
        async with router.client_of(11) as client:
            chosen.append(client.url)
        return chosen

    assert asyncio.run(route()) == ["b", "c", "a", "b", "c", "c", "b"]


def test_requests_wait_for_a_place_before_they_are_given_an_engine() -> None:
    async def route() -> str:
        clients = [SimpleNamespace(url=name) for name in "ab"]
        router = Router(clients, 1, 0, Roster("ab"))
        late: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def come_late() -> None:
            async with router.client_of(3) as client:
                late.set_result(client.url)

        async with router.client_of(1):
            async with router.client_of(2):
                task = asyncio.create_task(come_late())
                await asyncio.sleep(0)
                assert not late.done()
            await task
        return late.result()

    assert asyncio.run(route()) == "b"  # which was free first
