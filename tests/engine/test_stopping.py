"""What ends a response in a real vLLM server, and what penalties do: the tokens are always those of
the unstopped response up to the end, and the text is that of the tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rl.config import RolloutConfig, SamplingConfig
from megatron_rl.engine.pool import HttpEnginePool
from megatron_rl.engine.requests import Completion, GenerateRequest, Sampler
from megatron_rl.engine.server import Engine
from megatron_rl.errors import EngineError

PROMPT = (1, 20, 14, 21, 32)
EOS = 2
NUM_SAMPLES, NUM_TOKENS = 32, 24


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def sample(engine: Engine, **settings) -> tuple[Completion, ...]:
    """[NUM_SAMPLES] completions of the prompt, with the same seeds for all settings."""

    async def generate(request: GenerateRequest, sampler: Sampler) -> tuple[Completion, ...]:
        return await sampler.generate(request)

    request = GenerateRequest(
        token_ids=PROMPT,
        num_samples=NUM_SAMPLES,
        seed=512,
        sampling=SamplingConfig(**{"max_tokens": NUM_TOKENS, **settings}),
        key=0,
    )
    pool = HttpEnginePool([engine.address], RolloutConfig(), check=engine.check)
    [completions] = pool.run([partial(generate, request)])
    return completions


@pytest.fixture(scope="module")
def unstopped(engine: Engine) -> tuple[Completion, ...]:
    return sample(engine)


def check_prefixes(stopped: tuple[Completion, ...], unstopped: tuple[Completion, ...]) -> None:
    """The same tokens with the same log-probs, up to where each was stopped."""
    for short, long in zip(stopped, unstopped, strict=True):
        num_tokens = len(short.token_ids)
        assert short.token_ids == long.token_ids[:num_tokens]
        assert short.logprobs == pytest.approx(long.logprobs[:num_tokens], abs=1e-4)
        assert len(short.weight_versions) == num_tokens


def first_end(text: str, stops: list[str]) -> int:
    """Where the first of the stop texts ends; the length of the text if there is none."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    return min(ends, default=len(text))


@pytest.mark.parametrize("stops", [["a"], ["7", "xtra"], ["ra1", "ra2", "<extra3"]])
def test_a_response_ends_with_the_token_that_completes_a_stop_text(
    stops: list[str], engine: Engine, unstopped: tuple[Completion, ...], tokenizer
) -> None:
    """Tokens such as "<extra17>" have more than a stop text, which then ends within the token."""
    stopped = sample(engine, stop=stops)
    check_prefixes(stopped, unstopped)
    num_stopped = num_cut = 0
    for short, long in zip(stopped, unstopped, strict=True):
        pieces = [tokenizer.decode([token]) for token in long.token_ids]
        end = first_end("".join(pieces), stops)
        num_tokens = next(n for n in range(1, 100) if len("".join(pieces[:n])) >= end)
        assert len(short.token_ids) == num_tokens
        text = tokenizer.decode(short.token_ids)
        assert text == "".join(pieces[:num_tokens])
        if any(stop in text for stop in stops):
            num_stopped += 1
            num_cut += len(text) > end
            assert (short.finish_reason, short.ends_with_stop_token) == ("stop", False)
        else:
            assert short.finish_reason == long.finish_reason
            assert short.ends_with_stop_token == (long.token_ids[-1] == EOS)
    assert num_stopped > 0
    assert num_cut > 0 or stops == ["a"]


def test_a_special_token_may_be_a_stop_text(
    engine: Engine, unstopped: tuple[Completion, ...], tokenizer
) -> None:
    special = tokenizer.bos_token
    stopped = sample(engine, stop=[special])
    check_prefixes(stopped, unstopped)
    ended = [each for each in stopped if each.token_ids[-1] == tokenizer.bos_token_id]
    assert ended and all(each.finish_reason == "stop" for each in ended)
    assert not any(tokenizer.bos_token_id in each.token_ids[:-1] for each in stopped)


def test_stop_tokens_end_a_response_as_the_models_own_does(
    engine: Engine, unstopped: tuple[Completion, ...]
) -> None:
    stop_ids = [40, 41, 42]
    stopped = sample(engine, stop_token_ids=stop_ids)
    check_prefixes(stopped, unstopped)
    ends = {EOS, *stop_ids}
    for each in stopped:
        is_ended = each.token_ids[-1] in ends
        assert each.ends_with_stop_token == is_ended
        assert each.finish_reason == ("stop" if is_ended else "length")
        assert not ends.intersection(each.token_ids[:-1])
    assert any(each.token_ids[-1] in stop_ids for each in stopped)


def test_the_settings_of_evaluation_reach_the_sampler(
    engine: Engine, unstopped: tuple[Completion, ...], tokenizer
) -> None:
    assert any(each.token_ids[-1] == EOS for each in unstopped)
    long = sample(engine, min_tokens=NUM_TOKENS)
    assert {len(each.token_ids) for each in long} == {NUM_TOKENS}
    for penalty in (
        {"repetition_penalty": 50.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
    ):
        penalized = sample(engine, min_tokens=NUM_TOKENS, **penalty)
        repeats = [NUM_TOKENS - len(set(each.token_ids)) for each in penalized]
        assert sum(repeats) < 0.8 * sum(NUM_TOKENS - len(set(each.token_ids)) for each in long)


def test_a_stop_token_beyond_the_vocabulary_is_one_clear_error(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"status 400.*stop_token_ids"):
        sample(engine, stop_token_ids=[128])
