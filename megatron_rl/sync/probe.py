"""The parity probe, which checks that each engine serves the published weights.

It compares the log-probs of samples that the engines generated after an update with the learner's
log-probs of the same tokens at the published weights, both over the whole distribution. The result
is a report per engine, or SyncError. A checksum proves only that the bytes arrived; the probe shows
that the engine computes with them. It detects a stale packed copy, a layer that kept its old
tensor, or a prefix cache from before the update.

With float32 on both sides the condition is max |d logprob| <= 2e-5 x max(1, |logprob|) for every
token, which any mistake violates. With lower precision the two sides differ by rounding, so the
mean of |p - p| is compared with a bound. Measurements over probes of 48 sampled tokens, with vLLM
on the CPU, a float32 learner and Qwen3 models of 0.8M parameters:

    noise     BF16 0.0003 to 0.0018, INT8 W8A8 up to 0.0024, FP8 KV cache up to 0.016
              (means on a model trained longer: BF16 0.0051, FP8 weights 0.0073, INT4 weights 0.023)
    mistakes  head of other weights 0.30 and more, one layer's q_proj from another 0.035 to 0.13,
              two layers swapped 0.044 to 0.12 (0.010 to 0.058 after 32 steps of training),
              everything 15 steps old 0.018 to 0.066, only the head that old 0.005 to 0.012

The bounds below therefore accept the noise and detect large mistakes immediately. A head that is
never updated is detected only after enough updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config import RolloutConfig
from megatron_rl.errors import SyncError
from megatron_rl.records import MISSING_LOGPROB, Sample

FLOAT32_BOUND = 2e-5  # of |d logprob| / max(1, |logprob|)
# Largest accepted mean |p - p|, by the precision of the less precise side.
BOUNDS = {
    "float32": 0.0,
    "bfloat16": 0.015,
    "float16": 0.015,
    "int8": 0.015,
    "fp8": 0.03,
    "int4": 0.06,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The differences between an engine and the learner on the probe's tokens.

    Example: `ParityReport(num_tokens=48, mean_probability_gap=0.0041, max_probability_gap=0.06,
    max_relative_logprob_gap=0.11)`.
    """

    num_tokens: int
    mean_probability_gap: float  # mean |p_learner - p_engine|
    max_probability_gap: float
    max_relative_logprob_gap: float  # max |d logprob| / max(1, |logprob|)


def engine_precision(rollout: RolloutConfig) -> str:
    """The key of BOUNDS for the least precise of an engine's weights, activations and KV cache."""
    number = rollout.quantization.format.removesuffix("_w8a8")
    is_fp8 = number == "fp8" or rollout.kv_cache_dtype.startswith("fp8")
    if number == "int4" or not is_fp8:
        return rollout.dtype if number == "none" else number
    return "fp8"


def check_engines(
    pairs: Iterable[tuple[Sample, torch.Tensor]],
    *,
    urls: Sequence[str],
    version: int,
    engine_dtype: str,
    learner_dtype: str,
    tolerance: float,
) -> dict[str, ParityReport]:
    """A report of every engine, by url, from the samples that it generated.

    Each engine is judged by its own samples only. If the samples were pooled, one stale engine
    among many would pass.

    Args:
        pairs: samples with `rollout.engine`, each with the learner's full log-probs [L] float32.
        urls: of all engines that received the update.
        version: of the weights, for the error message.
        engine_dtype, learner_dtype, tolerance: as in `check_parity`.

    Raises:
        SyncError: an engine does not serve the published weights or has no sample among `pairs`, or
            a sample is not from any of these engines.
    """
    own: dict[str, list[tuple[Sample, torch.Tensor]]] = {url: [] for url in urls}
    for sample, full_logprobs in pairs:
        if sample.rollout.engine not in own:
            raise SyncError(
                f"parity probe: expected samples of {', '.join(urls)}, got one of engine "
                f"{sample.rollout.engine!r}"
            )
        own[sample.rollout.engine].append((sample, full_logprobs))
    reports = {}
    for url, of_engine in own.items():
        masks = [torch.from_numpy(sample.rollout.loss_mask) for sample, _ in of_engine]
        served = [
            torch.from_numpy(sample.rollout.rollout_logprobs).float() for sample, _ in of_engine
        ]
        try:
            reports[url] = check_parity(
                _join(served, masks),
                _join([full_logprobs for _, full_logprobs in of_engine], masks),
                engine_dtype=engine_dtype,
                learner_dtype=learner_dtype,
                tolerance=tolerance,
            )
        except SyncError as error:
            raise SyncError(f"engine {url} after update {version}: {error}") from error
    return reports


def _join(values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N] the masked values of all [L] tensors, concatenated."""
    return torch.cat([torch.zeros(0), *(each[mask] for each, mask in zip(values, masks))])


def check_parity(
    rollout_logprobs: torch.Tensor,
    full_logprobs: torch.Tensor,
    *,
    engine_dtype: str,
    learner_dtype: str,
    tolerance: float,
) -> ParityReport:
    """Compare the two sides, and raise an error if the engine does not serve the learner's weights.

    Args:
        rollout_logprobs: [N] floating-point, the engine's log-probs of tokens that it sampled.
        full_logprobs: [N] floating-point, the learner's log-probs of the same tokens.
        engine_dtype: a key of BOUNDS, from `engine_precision`.
        learner_dtype: a key of BOUNDS, the precision of the learner.
        tolerance: the largest accepted mean |p - p|; 0 means the bound of the less precise side.

    Raises:
        SyncError: the log-probs cannot be compared, are not finite, are -9999 or below (the value
            that an engine's route writes for NaN), or differ too much.
    """
    if rollout_logprobs.shape != full_logprobs.shape or rollout_logprobs.ndim != 1:
        raise SyncError(
            "parity probe: expected two tensors of one shape [N], got "
            f"{tuple(rollout_logprobs.shape)} and {tuple(full_logprobs.shape)}"
        )
    if rollout_logprobs.numel() == 0:
        raise SyncError("parity probe: expected at least one token, got none")
    engine, learner = rollout_logprobs.double().cpu(), full_logprobs.double().cpu()
    for name, values in (("engine", engine), ("learner", learner)):
        bad = ~values.isfinite() | (values <= MISSING_LOGPROB)
        if bad.any():
            position = int(bad.nonzero()[0])
            raise SyncError(
                f"parity probe: expected finite log-probs above {MISSING_LOGPROB}, the {name} gave "
                f"{float(values[position])} for token {position} of {values.numel()}"
            )
    report = _compare(engine, learner)
    is_exact = engine_dtype == "float32" and learner_dtype == "float32" and tolerance == 0.0
    measured = report.max_relative_logprob_gap if is_exact else report.mean_probability_gap
    bound = FLOAT32_BOUND if is_exact else tolerance or _bound(engine_dtype, learner_dtype)
    if measured > bound:
        what = "max |d logprob| / max(1, |logprob|)" if is_exact else "mean |p - p|"
        raise SyncError(
            f"parity probe: expected {what} of at most {bound:.3g} (engine {engine_dtype}, "
            f"learner {learner_dtype}), got {measured:.3g} over {report.num_tokens} tokens; the "
            "engine does not serve the published weights, or sync.probe_tolerance is too small"
        )
    return report


def _bound(*dtypes: str) -> float:
    for dtype in dtypes:
        if dtype not in BOUNDS:
            raise SyncError(
                f"parity probe: expected a precision of {', '.join(BOUNDS)}, got {dtype!r}; "
                "name one of them, or set sync.probe_tolerance"
            )
    return max(BOUNDS[dtype] for dtype in dtypes)


def _compare(engine: torch.Tensor, learner: torch.Tensor) -> ParityReport:
    probability_gap = (learner.exp() - engine.exp()).abs()
    relative = (learner - engine).abs() / learner.abs().clamp(min=1.0)
    return ParityReport(
        num_tokens=engine.numel(),
        mean_probability_gap=float(probability_gap.mean()),
        max_probability_gap=float(probability_gap.max()),
        max_relative_logprob_gap=float(relative.max()),
    )
