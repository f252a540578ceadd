"""Parity probe: does the engine serve the weights that were published?

In: the log-probs that an engine gave the tokens it sampled after an update, and the learner's for
the same tokens at the published weights. Out: a report, or SyncError. A checksum proves that bytes
arrived; only this proves that they are what the engine computes with (a stale packed copy, a layer
that kept its old tensor, a prefix cache from before).

Float32 on both sides: max |d logprob| <= 2e-5 x max(1, |logprob|), token by token; any mistake
shows. Below float32 the engines differ anyway, so the mean of |p - p| is held against a bound.
Measured over probes of 48 sampled tokens, vLLM on the CPU against a float32 learner, 0.8M-parameter
Qwen3 models:

    noise     BF16 0.0003 to 0.0018, INT8 W8A8 to 0.0024, FP8 KV cache to 0.016
              (means on a longer trained one: BF16 0.0051, FP8 weights 0.0073, INT4 weights 0.023)
    mistakes  head of other weights 0.30 and more, one layer's q_proj from another 0.035 to 0.13,
              two layers swapped 0.044 to 0.12 (0.010 to 0.058 after 32 steps of training),
              everything 15 steps old 0.018 to 0.066, only the head that old 0.005 to 0.012

So the bounds below let the noise pass and catch what is grossly wrong at once; a head that stays as
it was is caught only when enough updates have passed it by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.errors import SyncError
from megatron_rl.records import MISSING_LOGPROB

FLOAT32_BOUND = 2e-5  # of |d logprob| / max(1, |logprob|)
# Of the mean |p - p|, by the less precise side.
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
    """How far engine and learner are apart on the probe's tokens.

    Example: `ParityReport(num_tokens=48, mean_probability_gap=0.0041, max_probability_gap=0.06,
    max_relative_logprob_gap=0.11)`.
    """

    num_tokens: int
    mean_probability_gap: float  # mean |p_learner - p_engine|
    max_probability_gap: float
    max_relative_logprob_gap: float  # max |d logprob| / max(1, |logprob|)


def check_parity(
    rollout_logprobs: torch.Tensor,
    recomputed_logprobs: torch.Tensor,
    *,
    engine_dtype: str,
    learner_dtype: str,
    tolerance: float,
) -> ParityReport:
    """Compare, and refuse an engine that does not serve what the learner holds.

    Args:
        rollout_logprobs: [N] floating, the engine's, of tokens it sampled.
        recomputed_logprobs: [N] floating, the learner's, of the same tokens.
        engine_dtype: a key of BOUNDS: the least precise of the engine's weights, activations and
            KV cache ("fp8" for BF16 weights with an FP8 KV cache).
        learner_dtype: the same of the learner.
        tolerance: largest mean |p - p|; 0 chooses by precision, as the head of this file says.

    Raises:
        SyncError: not comparable, not finite, -9999 or below (the route's NaN), or too far apart.
    """
    if rollout_logprobs.shape != recomputed_logprobs.shape or rollout_logprobs.ndim != 1:
        raise SyncError(
            "parity probe: expected two tensors of one shape [N], got "
            f"{tuple(rollout_logprobs.shape)} and {tuple(recomputed_logprobs.shape)}"
        )
    if rollout_logprobs.numel() == 0:
        raise SyncError("parity probe: expected at least one token, got none")
    engine, learner = rollout_logprobs.double().cpu(), recomputed_logprobs.double().cpu()
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
