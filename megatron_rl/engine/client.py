"""Prompts to rollouts over HTTP: token ids in, token ids, log-probs and weight versions out.

In: prompts, sampling settings, one seed a prompt. Out: a RolloutGroup a prompt, in the same order.
Asked is `POST /inference/v1/generate` of vLLM 0.32 (vllm/entrypoints/scale_out/token_in_token_out),
one request a prompt with `n` samples. Who answers does not change the samples: prompt and seed
decide, up to the rounding of logits, which in vLLM depends on what else is in the batch.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import httpx

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.errors import EngineError
from megatron_rl.records import (
    MAX_LOGPROB_ROUNDING,
    MAX_SAMPLES,
    MISSING_LOGPROB,
    SAMPLE_BITS,
    EngineAddress,
    Prompt,
    Rollout,
    RolloutGroup,
)

CHECK_SECONDS = 0.5  # between looks at the engines' processes
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
REASON_CHARACTERS = 600
POISONED = "weights_poisoned"  # engine/gate.py: will not pass by itself


def sampling_seed(run_seed: int, step: int, prompt_index: int) -> int:
    """The seed of one prompt's samples: 63 bits, the low SAMPLE_BITS zero.

    A CPU generator of torch reads only the low 32 bits. There, seeds of neighbouring prompts are
    SAMPLE_BITS apart, so that within a step no sample shares its seed with another prompt's; where
    the row starts, and the bits above, which CUDA's generator reads too, are a hash.
    """
    start = _hash(run_seed, step) + prompt_index
    low_bits = 32 - SAMPLE_BITS
    low = (start % 2**low_bits) << SAMPLE_BITS
    return (_hash(run_seed, step, prompt_index) % 2**31) << 32 | low


def _hash(*numbers: int) -> int:
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# Picks the engine, and what it is asked.
Question = tuple[int, Callable[["_EngineClient"], Awaitable[Any]]]


class RolloutClient:
    """Asks engines for samples; keeps no connection between calls.

    Args:
        addresses: engines that are ready; prompt i of the run's stream goes to engine i modulo
            their number.
        decode: token ids of a response to its text, special tokens left out.
        check: raises EngineError when an engine's process died; called while waiting, so that a
            death is told with its last words and not as a timeout.
    """

    def __init__(
        self,
        addresses: Sequence[EngineAddress],
        config: RolloutConfig,
        *,
        decode: Callable[[Sequence[int]], str],
        check: Callable[[], None],
    ) -> None:
        if not addresses:
            raise EngineError("rollout client: expected at least one engine, got none")
        self._addresses = tuple(addresses)
        self._config = config
        self._decode = decode
        self._check = check

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        num_samples: int,
        seeds: Sequence[int],
    ) -> list[RolloutGroup]:
        """Sample `num_samples` responses a prompt; blocks until all are there.

        Args:
            seeds: [P], see `sampling_seed`; sample j of prompt i is drawn with `seeds[i] + j`.

        Raises EngineError: an engine died, refused, or answered nonsense; a request failed
        rollout.max_retries times over, or had no answer within rollout.request_timeout_seconds.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected one a prompt, {len(prompts)}, got {len(seeds)}")
        if not 1 <= num_samples <= MAX_SAMPLES:
            raise ValueError(f"num_samples: expected 1 to {MAX_SAMPLES}, got {num_samples}")
        questions = [
            (
                prompt.index,
                partial(
                    self._group,
                    prompt=prompt,
                    body=request_body(prompt, sampling, num_samples, seed),
                ),
            )
            for prompt, seed in zip(prompts, seeds)
        ]
        return asyncio.run(self._ask_all(questions))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """The engines' log-probs of given tokens, over the whole vocabulary at temperature 1.

        Args:
            sequences: token ids, two or more each, shared out over the engines.

        Returns:
            For each sequence a log-prob a token, 0.0 for the first, which has none.

        Raises EngineError as `generate` does.
        """
        questions = [
            (number, partial(self._scores, token_ids=tuple(token_ids), where=f"sequence {number}"))
            for number, token_ids in enumerate(sequences)
        ]
        return asyncio.run(self._ask_all(questions))

    async def _ask_all(self, questions: Sequence[Question]) -> list[Any]:
        """The answers, in order; `number % engines` says who is asked."""
        engines = [_EngineClient(address, self._config) for address in self._addresses]
        tasks = [
            asyncio.create_task(question(engines[number % len(engines)]))
            for number, question in questions
        ]
        answers = asyncio.gather(*tasks)
        watcher = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({answers, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done():
                watcher.result()  # raises: the watcher ends in no other way
            return await answers
        finally:
            answers.cancel()
            watcher.cancel()
            await asyncio.gather(answers, watcher, return_exceptions=True)
            for engine in engines:
                await engine.close()

    async def _group(
        self, engine: _EngineClient, prompt: Prompt, body: dict[str, Any]
    ) -> RolloutGroup:
        answer = await engine.ask(body, f"prompt {prompt.index}", self._check)
        num_samples = body["sampling_params"]["n"]
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(num_samples)):
            raise EngineError(
                f"engine {engine.url}: expected {num_samples} samples for prompt {prompt.index}, "
                f"got {len(choices)}"
            )
        where = f"engine {engine.url}, prompt {prompt.index}"
        rollouts = tuple(
            rollout_from_choice(prompt, choice, self._decode, f"{where}, sample {index}")
            for index, choice in enumerate(choices)
        )
        return RolloutGroup(prompt=prompt, rollouts=rollouts)

    async def _scores(
        self, engine: _EngineClient, token_ids: tuple[int, ...], where: str
    ) -> tuple[float, ...]:
        answer = await engine.ask(scoring_body(token_ids), where, self._check)
        entries = (answer["prompt_logprobs"] or [])[1:]  # the first token has none
        if len(entries) != len(token_ids) - 1:
            raise EngineError(
                f"engine {engine.url}, {where}: expected {len(token_ids) - 1} log-probs of given "
                f"tokens, got {len(entries)}"
            )
        logprobs = [
            entry.get(str(token), {}).get("logprob")
            for token, entry in zip(token_ids[1:], entries, strict=True)
        ]
        check_logprobs(logprobs, token_ids[1:], f"engine {engine.url}, {where}")
        return (0.0, *logprobs)

    async def _watch(self) -> None:
        while True:
            self._check()
            await asyncio.sleep(CHECK_SECONDS)


class _EngineClient:
    """One engine during one call of `generate`: its connections, its bound on requests."""

    def __init__(self, address: EngineAddress, config: RolloutConfig) -> None:
        self.url = address.url
        self._max_retries = config.max_retries
        self._timeout_seconds = config.request_timeout_seconds
        self._in_flight = asyncio.Semaphore(config.max_in_flight)
        self._client = httpx.AsyncClient(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.token}"},
            timeout=config.request_timeout_seconds,
            limits=httpx.Limits(max_connections=config.max_in_flight),
            trust_env=False,  # a proxy from the environment must not see the token
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(
        self, body: dict[str, Any], what: str, check: Callable[[], None]
    ) -> dict[str, Any]:
        """The engine's answer; failures that may pass are tried again, with growing pauses."""
        failure = ""
        for attempt in range(self._max_retries + 1):
            if attempt:
                pause = FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1)
                await asyncio.sleep(min(pause, MAX_BACKOFF_SECONDS))
                check()
            async with self._in_flight:
                answer, failure = await self._try(body, what)
            if answer is not None:
                return answer
        await asyncio.sleep(2 * CHECK_SECONDS)  # a death is noticed a moment after the connection's
        check()
        raise EngineError(
            f"engine {self.url}, {what}: failed {self._max_retries + 1} times "
            f"(rollout.max_retries={self._max_retries}), the last time with {failure}"
        )

    async def _try(self, body: dict[str, Any], what: str) -> tuple[dict[str, Any] | None, str]:
        """An answer, or None and a failure that may pass; EngineError for one that will not."""
        try:
            response = await self._client.post("/inference/v1/generate", json=body)
        except httpx.TimeoutException as error:
            raise EngineError(
                f"engine {self.url}, {what}: expected an answer within rollout."
                f"request_timeout_seconds={self._timeout_seconds:g}, got {type(error).__name__}"
            ) from error
        except httpx.TransportError as error:
            return None, repr(error)
        reason = f"status {response.status_code}: {response.text[:REASON_CHARACTERS]}"
        if response.status_code >= 400:
            if response.status_code < 500 or POISONED in response.text:
                raise EngineError(f"engine {self.url}, {what}: {reason}")
            return None, reason
        answer = response.json()
        reasons = {choice["finish_reason"] for choice in answer["choices"]}
        if not reasons <= {"stop", "length"}:  # aborted: the samples are cut anywhere
            return None, f"finish reasons {sorted(reasons)}"
        return answer, ""


def request_body(
    prompt: Prompt, sampling: SamplingConfig, num_samples: int, seed: int
) -> dict[str, Any]:
    """The JSON of one request. Every setting is sent: the model's own defaults do not apply."""
    return {
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "n": num_samples,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        },
    }


def scoring_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """The JSON of one request that asks for the log-probs of given tokens; the one token that an
    engine must sample is thrown away.
    """
    return {
        "token_ids": list(token_ids),
        "sampling_params": {
            "n": 1,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,  # of the given token only
            "detokenize": False,
        },
    }


def rollout_from_choice(
    prompt: Prompt, choice: dict[str, Any], decode: Callable[[Sequence[int]], str], where: str
) -> Rollout:
    """One sample of the answer; EngineError, opening with `where`, for a nonsense one."""
    tokens = tuple(choice["token_ids"])
    content = choice["logprobs"]["content"]
    if not tokens or [entry["token_id"] for entry in content] != list(tokens):
        raise EngineError(
            f"{where}: expected a log-prob for each of 1 or more tokens, got {len(content)} "
            f"log-probs for {len(tokens)} tokens"
        )
    logprobs = tuple(entry["logprob"] for entry in content)
    check_logprobs(logprobs, tokens, f"{where}, response")
    num_prompt = len(prompt.token_ids)
    return Rollout(
        token_ids=prompt.token_ids + tokens,
        loss_mask=(False,) * num_prompt + (True,) * len(tokens),
        rollout_logprobs=(0.0,) * num_prompt + logprobs,
        weight_versions=(-1,) * num_prompt
        + _versions(choice["weight_versions"], len(tokens), where),
        finish_reason=choice["finish_reason"],
        text=decode(tokens),
    )


def check_logprobs(logprobs: Sequence[float | None], token_ids: Sequence[int], where: str) -> None:
    """EngineError, opening with `where`, for the first log-prob that is none."""
    for position, logprob in enumerate(logprobs):
        # Written so that NaN fails too.
        if logprob is None or not MISSING_LOGPROB < logprob <= MAX_LOGPROB_ROUNDING:
            raise EngineError(
                f"{where} token {position} (id {token_ids[position]}): expected "
                f"a log-prob above {MISSING_LOGPROB:g} (how the engine writes NaN) and at most 0, "
                f"got {logprob}"
            )


def _versions(spans: list[dict[str, Any]] | None, num_tokens: int, where: str) -> tuple[int, ...]:
    """A version a token. "default" is what vLLM reports before the first update: version 0."""
    versions: list[int] = []
    for span in spans or ():
        label = span["version"]
        if span["start"] != len(versions) or not (label == "default" or label.isdigit()):
            raise EngineError(
                f"{where}: expected weight versions as whole numbers without gaps, got {spans}"
            )
        version = 0 if label == "default" else int(label)
        versions += [version] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise EngineError(
            f"{where}: expected the weight versions of {num_tokens} tokens, got {spans}"
        )
    return tuple(versions)
