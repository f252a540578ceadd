"""Builds the JSON bodies of requests for samples and log-probs, and checks and parses the answers.

The route is `POST /inference/v1/generate` of vLLM 0.32
(vllm/entrypoints/scale_out/token_in_token_out). It takes token ids and returns token ids, log-probs
and weight versions. All functions here are pure; `engine/http_sampling.py` sends and receives.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rl.engine.requests import Completion, GenerateRequest, num_requested_logprobs
from megatron_rl.errors import EngineError
from megatron_rl.records import MAX_LOGPROB_ROUNDING, MISSING_LOGPROB, RolloutHead

MAX_MASS_ROUNDING = 1e-3  # by which probabilities of float32 log-probs may add up to more than 1


def generate_body(request: GenerateRequest, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """Body of a request for samples. It states every setting, so that the defaults in the model's
    generation config never apply.

    Stop texts are searched for in the text with special tokens, so that they may be one. vLLM
    leaves a stop text out of its own text and not out of the tokens; only the tokens are read here.

    Args:
        end_token_ids: a sample ends after each of them; the engine adds the tokenizer's eos and
            those of the generation config.
    """
    sampling = request.sampling
    return {
        "token_ids": list(request.token_ids),
        "sampling_params": {
            "n": request.num_samples,
            "seed": request.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted({*end_token_ids, *sampling.stop_token_ids}),
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logprobs": num_requested_logprobs(request.num_logprobs),
            "detokenize": bool(sampling.stop),
            "skip_special_tokens": False,
        },
    }


def score_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """Body of a request for the log-probs of given tokens. An engine always samples at least one
    token, which is discarded.
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


def read_completions(
    answer: dict[str, Any], request: GenerateRequest, url: str
) -> tuple[Completion, ...]:
    """[num_samples] the completions of an answer, sorted by sample index.

    Raises:
        EngineError: samples are missing, or one of them is invalid.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(request.num_samples)):
        raise EngineError(
            f"engine {url}: expected {request.num_samples} samples for prompt {request.key}, "
            f"got {len(choices)}"
        )
    return tuple(
        read_completion(
            choice,
            url,
            f"engine {url}, prompt {request.key}, sample {index}",
            num_logprobs=request.num_logprobs,
        )
        for index, choice in enumerate(choices)
    )


def read_completion(
    choice: dict[str, Any], url: str, where: str, *, num_logprobs: int = 0
) -> Completion:
    """Parse one sample of an answer. Its `stop_reason` is null after the end-of-sequence token, the
    id of another stop token, or the stop text that was found.

    Args:
        url: the engine that sampled it.
        where: the beginning of an error message.
        num_logprobs: K of the head; 0: no head was requested.

    Raises:
        EngineError: the sample has no tokens, or a token has no valid log-prob, weight version or
            head.
    """
    token_ids = tuple(choice["token_ids"])
    content = choice["logprobs"]["content"]
    if not token_ids or [entry["token_id"] for entry in content] != list(token_ids):
        raise EngineError(
            f"{where}: expected a log-prob for each of 1 or more tokens, got {len(content)} "
            f"log-probs for {len(token_ids)} tokens"
        )
    logprobs = tuple(entry["logprob"] for entry in content)
    check_logprobs(logprobs, token_ids, f"{where}, response")
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        weight_versions=_versions(choice["weight_versions"], len(token_ids), where),
        finish_reason=choice["finish_reason"],
        ends_with_stop_token=choice["finish_reason"] == "stop"
        and not isinstance(choice.get("stop_reason"), str),
        engine=url,
        head=read_head(content, num_logprobs, where) if num_logprobs else None,
        routes=read_routes(choice.get("routed_experts"), where),
    )


def read_routes(encoded: str | None, where: str) -> np.ndarray | None:
    """The experts of each token, [tokens, layers, k] integers; None if the engine returns none.

    Args:
        encoded: an array in NumPy's format, in base64 (vllm/utils/serial_utils.py, numpy2base64).
        where: the beginning of an error message.

    Raises:
        EngineError: it is no such array.
    """
    if encoded is None:
        return None
    try:
        routes = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise EngineError(f"{where}: expected routed experts as an array, got: {error}") from error
    if routes.ndim != 3 or not np.issubdtype(routes.dtype, np.integer):
        raise EngineError(
            f"{where}: expected routed experts of [tokens, layers, experts of a token] integers, "
            f"got {list(routes.shape)} {routes.dtype}"
        )
    return routes


def read_head(content: Sequence[dict[str, Any]], num_logprobs: int, where: str) -> RolloutHead:
    """The K likeliest tokens of every sampled token's distribution.

    Args:
        content: for every token its id, its log-prob, and in `top_logprobs` K + 1 tokens with their
            log-probs, the sampled one first; those that the sampler excludes have MISSING_LOGPROB.
        where: the beginning of an error message.

    Raises:
        EngineError: a list is not of K + 1 tokens, or its log-probs are not those of one
            distribution, or not the sampled token's.
    """
    listed = [entry.get("top_logprobs") or () for entry in content]
    for position, tokens in enumerate(listed):
        if len(tokens) != num_logprobs + 1:
            raise EngineError(
                f"{where}, response token {position}: expected {num_logprobs + 1} log-probs "
                f"(objective.score_centering.num_logprobs and one more), got {len(tokens)}"
            )
    ids = np.array([[each["token_id"] for each in tokens] for tokens in listed], dtype=np.int64)
    logprobs = np.array([[each["logprob"] for each in tokens] for tokens in listed], dtype=float)
    ordered = np.sort(ids, axis=1)
    is_sound = (ordered[:, 0] >= 0) & (ordered[:, 1:] != ordered[:, :-1]).all(axis=1)
    # Comparisons are written so that NaN fails them.
    is_logprob = (logprobs >= MISSING_LOGPROB) & (logprobs <= MAX_LOGPROB_ROUNDING)
    is_sound &= is_logprob.all(axis=1)
    is_sound &= np.exp(logprobs).sum(axis=1) <= 1 + MAX_MASS_ROUNDING
    is_sound &= ids[:, 0] == [entry["token_id"] for entry in content]
    is_sound &= logprobs[:, 0] == [entry["logprob"] for entry in content]
    if not is_sound.all():
        position = int(is_sound.argmin())
        raise EngineError(
            f"{where}, response token {position}: expected distinct tokens with log-probs of one "
            f"distribution, the sampled one first, got {listed[position]}"
        )
    likeliest = np.argsort(-logprobs, axis=1, kind="stable")[:, :num_logprobs]
    ids = np.take_along_axis(ids, likeliest, axis=1)
    logprobs = np.take_along_axis(logprobs, likeliest, axis=1)
    is_excluded = logprobs <= MISSING_LOGPROB
    return RolloutHead(
        token_ids=np.where(is_excluded, -1, ids).astype(np.int32),
        logprobs=np.where(is_excluded, -np.inf, logprobs).astype(np.float32),
    )


def read_scores(answer: dict[str, Any], token_ids: Sequence[int], where: str) -> tuple[float, ...]:
    """The log-probs of given tokens; 0.0 for the first one.

    Args:
        where: the beginning of an error message.

    Raises:
        EngineError: a token has no valid log-prob.
    """
    entries = (answer["prompt_logprobs"] or [])[1:]  # the first token has none
    if len(entries) != len(token_ids) - 1:
        raise EngineError(
            f"{where}: expected {len(token_ids) - 1} log-probs of given tokens, got {len(entries)}"
        )
    logprobs = [
        entry.get(str(token), {}).get("logprob")
        for token, entry in zip(token_ids[1:], entries, strict=True)
    ]
    check_logprobs(logprobs, token_ids[1:], where)
    return (0.0, *logprobs)


def check_logprobs(logprobs: Sequence[float | None], token_ids: Sequence[int], where: str) -> None:
    """Raise EngineError, beginning with `where`, for the first value that is not a log-prob."""
    for position, logprob in enumerate(logprobs):
        # The comparison is written so that NaN fails it too.
        if logprob is None or not MISSING_LOGPROB < logprob <= MAX_LOGPROB_ROUNDING:
            raise EngineError(
                f"{where} token {position} (id {token_ids[position]}): expected "
                f"a log-prob above {MISSING_LOGPROB:g} (how the engine writes NaN) and at most 0, "
                f"got {logprob}"
            )


def _versions(spans: list[dict[str, Any]] | None, num_tokens: int, where: str) -> tuple[int, ...]:
    """One version per token. Until the first update vLLM reports "default", which is version 0."""
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
