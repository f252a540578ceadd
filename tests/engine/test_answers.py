"""Answers of the engine's route, as it gives them and as it must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_rl.config import SamplingConfig
from megatron_rl.engine.answers import (
    generate_body,
    read_completion,
    read_completions,
    read_scores,
    score_body,
)
from megatron_rl.engine.requests import GenerateRequest
from megatron_rl.errors import EngineError

REQUEST = GenerateRequest(
    token_ids=(1, 9),
    num_samples=2,
    seed=512,
    sampling=SamplingConfig(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, max_tokens=12),
    key=4,
)


def choice(**changes: Any) -> dict[str, Any]:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 2, "logprob": -0.25}]
    return {
        "index": 0,
        "token_ids": [7, 2],
        "finish_reason": "stop",
        "stop_reason": None,
        "logprobs": {"content": content},
        "weight_versions": [{"version": "default", "start": 0, "end": 2}],
    } | changes


def test_every_setting_is_sent() -> None:
    assert generate_body(REQUEST, (2, 5)) == {
        "token_ids": [1, 9],
        "sampling_params": {
            "n": 2,
            "seed": 512,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "max_tokens": 12,
            "min_tokens": 0,
            "stop": [],
            "stop_token_ids": [2, 5],
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "detokenize": False,
            "skip_special_tokens": False,
        },
    }
    sampling = SamplingConfig(
        stop=["</answer>"],
        stop_token_ids=[7],
        min_tokens=3,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
    )
    body = generate_body(replace(REQUEST, sampling=sampling), (5,))["sampling_params"]
    assert (body["stop"], body["stop_token_ids"], body["min_tokens"]) == (["</answer>"], [5, 7], 3)
    assert body["detokenize"]  # without it vLLM does not look for texts
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    assert [body[name] for name in penalties] == [1.5, -0.5, 0.25]
    assert score_body((1, 9))["sampling_params"]["prompt_logprobs"] == 0
    # One more than K: the route lists the sampled token first, likely or not.
    with_heads = generate_body(replace(REQUEST, num_logprobs=32), ())
    assert with_heads["sampling_params"]["logprobs"] == 33


def test_completions_come_by_sample_index_and_name_their_engine() -> None:
    second = choice(index=1, finish_reason="length")
    completions = read_completions({"choices": [second, choice()]}, REQUEST, "http://a")
    assert [each.finish_reason for each in completions] == ["stop", "length"]
    assert completions[0].token_ids == (7, 2)
    assert completions[0].logprobs == (-0.5, -0.25)
    assert completions[0].weight_versions == (0, 0)  # "default": before the first update
    assert {each.engine for each in completions} == {"http://a"}


@pytest.mark.parametrize("indices", [[], [0], [1], [0, 0], [0, 1, 2]])
def test_missing_choices_are_an_error(indices: list[int]) -> None:
    answer = {"choices": [choice(index=index) for index in indices]}
    expected = f"engine http://a: expected 2 samples for prompt 4, got {len(indices)}"
    with pytest.raises(EngineError, match=expected):
        read_completions(answer, REQUEST, "http://a")


def test_a_bad_sample_is_named_whole() -> None:
    answer = {"choices": [choice(), choice(index=1, token_ids=[7])]}
    with pytest.raises(EngineError, match="engine http://a, prompt 4, sample 1: expected a log-pr"):
        read_completions(answer, REQUEST, "http://a")


@pytest.mark.parametrize(
    ("reason", "stop_reason", "expected"),
    [
        ("stop", None, True),  # the end-of-sequence token
        ("stop", 2, True),  # another stop token
        ("stop", "</answer>", False),  # a stop text
        ("length", None, False),
    ],
)
def test_whether_the_last_token_only_ends_the_text(reason, stop_reason, expected) -> None:
    ended = choice(finish_reason=reason, stop_reason=stop_reason)
    assert read_completion(ended, "http://a", "").ends_with_stop_token is expected


def test_versions_are_kept_per_token() -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    completion = read_completion(choice(weight_versions=spans), "http://a", "")
    assert completion.weight_versions == (3, 4)
    assert completion.logprobs == (-0.5, -0.25)


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
        read_completion(choice(weight_versions=spans), "http://a", "engine A")


@pytest.mark.parametrize("logprob", [-9999.0, -10000.0, float("nan"), 2e-3, None])
def test_a_logprob_that_is_none_is_an_error(logprob) -> None:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 2, "logprob": logprob}]
    with pytest.raises(EngineError, match=r"engine A, response token 1 \(id 2\): expected a log-"):
        read_completion(choice(logprobs={"content": content}), "http://a", "engine A")


def with_heads(*lists: list[tuple[int, float]]) -> dict[str, Any]:
    """A sample whose tokens are the first ones of the lists."""
    content = [
        {
            "token_id": tokens[0][0],
            "logprob": tokens[0][1],
            "top_logprobs": [{"token_id": token, "logprob": value} for token, value in tokens],
        }
        for tokens in lists
    ]
    return choice(
        token_ids=[each[0][0] for each in lists],
        logprobs={"content": content},
        weight_versions=[{"version": "default", "start": 0, "end": len(lists)}],
    )


def test_a_head_is_the_likeliest_tokens() -> None:
    sample = with_heads(
        [(7, -3.0), (4, -0.25), (9, -2.0)],  # K=2: the sampled token is not one of them
        [(2, -0.5), (3, -1.25), (8, -9999.0)],
    )
    head = read_completion(sample, "http://a", "engine A", num_logprobs=2).head
    assert head.token_ids.tolist() == [[4, 9], [2, 3]]
    assert head.logprobs.tolist() == [[-0.25, -2.0], [-0.5, -1.25]]
    assert (head.token_ids.dtype, head.logprobs.dtype) == (np.int32, np.float32)
    # The sampler left one token at the second place: nothing else is in the support.
    sample = with_heads([(7, -3.0), (4, -0.25), (9, -2.0)], [(2, 0.0), (3, -9999.0), (8, -9999.0)])
    head = read_completion(sample, "http://a", "engine A", num_logprobs=2).head
    assert head.token_ids.tolist() == [[4, 9], [2, -1]]
    assert head.logprobs.tolist() == [[-0.25, -2.0], [0.0, -np.inf]]
    assert read_completion(sample, "http://a", "engine A").head is None
    sample |= {"index": 0}
    [completion] = read_completions(
        {"choices": [sample]}, replace(REQUEST, num_samples=1, num_logprobs=2), "http://a"
    )
    assert completion.head == head


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([(2, -0.5), (3, -1.25)], r"expected 3 log-probs \(objective\.score_cent.* more\), got 2"),
        ([(2, -0.5), (3, -1.25), (4, -2.0), (5, -2.5)], "got 4"),
        ([(2, -0.5), (3, -1.25), (3, -1.25)], "expected distinct tokens"),
        ([(2, -0.5), (3, -1.25), (-4, -3.0)], "expected distinct tokens"),
        ([(2, -0.5), (3, float("nan")), (4, -2.0)], "expected distinct tokens"),
        ([(2, -0.5), (3, None), (4, -2.0)], "expected distinct tokens"),
        ([(2, -0.5), (3, -9999.5), (4, -2.0)], "expected distinct tokens"),
        ([(2, -0.5), (3, -0.5), (4, -2.0)], "log-probs of one distribution, the sampled one first"),
    ],
)
def test_a_head_that_is_none(second: list[tuple[int, Any]], expected: str) -> None:
    sample = with_heads([(7, -3.0), (4, -0.25), (9, -2.0)], second)
    with pytest.raises(EngineError, match=f"engine A, response token 1: .*{expected}"):
        read_completion(sample, "http://a", "engine A", num_logprobs=2)


@pytest.mark.parametrize(("key", "value"), [("token_id", 3), ("logprob", -0.75)])
def test_a_head_of_another_token(key: str, value: float) -> None:
    sample = with_heads([(2, -0.5), (3, -1.25), (4, -2.0)])
    sample["logprobs"]["content"][0]["top_logprobs"][0][key] = value
    with pytest.raises(EngineError, match="response token 0: expected distinct tokens"):
        read_completion(sample, "http://a", "engine A", num_logprobs=2)


def test_missing_logprobs_are_an_error() -> None:
    content = [{"token_id": 7, "logprob": -0.5}]
    with pytest.raises(EngineError, match="1 log-probs for 2 tokens"):
        read_completion(choice(logprobs={"content": content}), "http://a", "engine A")


def test_a_sample_without_tokens_is_an_error() -> None:
    empty = choice(token_ids=[], logprobs={"content": []})
    with pytest.raises(EngineError, match="0 log-probs for 0 tokens"):
        read_completion(empty, "http://a", "engine A")


def test_scores_of_given_tokens() -> None:
    entries = [None, {"9": {"logprob": -1.5}}, {"4": {"logprob": -0.5}, "8": {"logprob": -0.1}}]
    assert read_scores({"prompt_logprobs": entries}, (1, 9, 4), "A") == (0.0, -1.5, -0.5)
    for wrong, message in (
        (None, "A: expected 2 log-probs of given tokens, got 0"),
        (entries[:2], "A: expected 2 log-probs of given tokens, got 1"),
        ([None, {"9": {"logprob": -1.5}}, {}], r"A token 1 \(id 4\): expected a log-prob"),
        ([None, {"9": {"logprob": -9999.0}}, entries[2]], r"A token 0 \(id 9\): expected a log-pr"),
    ):
        with pytest.raises(EngineError, match=message):
            read_scores({"prompt_logprobs": wrong}, (1, 9, 4), "A")
