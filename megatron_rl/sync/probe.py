"""The parity probe's comparison of log-probs of samples that the engines generated after an update
with the learner's of the same tokens at the published weights, both over the whole distribution.

A checksum proves only that the bytes arrived; the probe shows that the engine computes with them.
It detects a stale packed copy, a layer that kept its old tensor, or a prefix cache from before the
update. `sync/change.py` is the other half of the probe: an engine that kept all its old weights.

With float32 on both sides the condition is max |d logprob| <= 2e-5 x max(1, |logprob|) for every
token, which any mistake violates. With lower precision the two sides differ by rounding, so the
mean of |p - p| is compared with a bound, in standard errors of the mean. Measurements with vLLM on
the CPU, a float32 learner and Qwen3 models of 0.8M parameters:

    noise     BF16 0.0003 to 0.0018, INT8 W8A8 up to 0.0024, FP8 KV cache up to 0.016
              (means on a model trained longer: BF16 0.0051, FP8 weights 0.0073, INT4 weights 0.023)
    mistakes  head of other weights 0.30 and more, one layer's q_proj from another 0.035 to 0.13,
              two layers swapped 0.044 to 0.12 (0.010 to 0.058 after 32 steps of training),
              everything 15 steps old 0.018 to 0.066, only the head that old 0.005 to 0.012

The bounds below therefore accept the noise and detect large mistakes. A mean over few tokens can be
above its bound by chance: then the probe asks again with more (`loop/parity.py`), and an engine is
wrong if the mean is still certainly above it, or, in float32, if the new tokens violate the
condition too.

The units of the standard error are prompts. Samples of one prompt have their first context in
common, and short ones all of it, so that they repeat one error of rounding; with several prompts
that is no difference from samples. With a single prompt there is no standard error, and a mean is
certain that not even the rounding of one token reaches (GROSS times the bound).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.errors import SyncError
from megatron_rl.records import MISSING_LOGPROB, Rollout, Sample
from megatron_rl.sync.ratios import STANDARD_ERRORS, ratio

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
GROSS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Precisions:
    """What the bound depends on.

    Example: `Precisions(engine="bfloat16", learner="float32", tolerance=0.0)`.
    """

    engine: str  # a key of BOUNDS, from `engine_precision`
    learner: str  # a key of BOUNDS
    tolerance: float  # the bound of the mean |p - p|; 0: that of the less precise side

    @property
    def is_exact(self) -> bool:
        """Whether every token must agree."""
        return self.engine == self.learner == "float32" and self.tolerance == 0.0

    def bound(self) -> float:
        """The largest accepted mean |p - p|, or relative gap of a token if `is_exact`.

        Raises:
            SyncError: a precision has no bound and there is no tolerance.
        """
        if self.is_exact or self.tolerance:
            return self.tolerance or FLOAT32_BOUND
        for dtype in (self.engine, self.learner):
            if dtype not in BOUNDS:
                raise SyncError(
                    f"parity probe: expected a precision of {', '.join(BOUNDS)}, got {dtype!r}; "
                    "name one of them, or set sync.probe_tolerance"
                )
        return max(BOUNDS[self.engine], BOUNDS[self.learner])


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The differences between an engine and the learner on the probe's tokens.

    Example: `ParityReport(num_tokens=48, mean_probability_gap=0.0041, standard_error=0.0006,
    max_probability_gap=0.06, max_relative_logprob_gap=0.11, precisions=Precisions(...),
    bound=0.015)`.
    """

    num_tokens: int
    mean_probability_gap: float  # mean |p_learner - p_engine|
    standard_error: float  # of the mean, over the prompts; infinite with a single one
    max_probability_gap: float
    max_relative_logprob_gap: float  # max |d logprob| / max(1, |logprob|)
    precisions: Precisions
    bound: float

    @property
    def is_above(self) -> bool:
        """Whether the bound is exceeded, by a mistake or by chance."""
        is_exact = self.precisions.is_exact
        measured = self.max_relative_logprob_gap if is_exact else self.mean_probability_gap
        return measured > self.bound

    @property
    def is_certain(self) -> bool:
        """Whether the bound is exceeded by more than chance."""
        if self.precisions.is_exact:
            return self.is_above
        if math.isinf(self.standard_error):
            return self.mean_probability_gap > GROSS * self.bound
        return self.mean_probability_gap - STANDARD_ERRORS * self.standard_error > self.bound

    def complaint(self) -> str:
        """What is wrong with an engine whose report `is_certain`."""
        if self.precisions.is_exact:
            what, measured = (
                "max |d logprob| / max(1, |logprob|)",
                f"{self.max_relative_logprob_gap:.3g}",
            )
        elif math.isinf(self.standard_error):
            what, measured = "mean |p - p|", f"{self.mean_probability_gap:.3g}"
        else:
            distance = (self.mean_probability_gap - self.bound) / max(self.standard_error, 1e-12)
            what, measured = (
                "mean |p - p|",
                f"{self.mean_probability_gap:.3g} +- {self.standard_error:.2g}, "
                f"{min(distance, 999):.0f} standard errors above it,",
            )
        return (
            f"parity probe: expected {what} of at most {self.bound:.3g} (engine "
            f"{self.precisions.engine}, learner {self.precisions.learner}), got {measured} over "
            f"{self.num_tokens} tokens; the engine does not serve the published weights, or "
            "sync.probe_tolerance is too small"
        )


def engine_precision(rollout: RolloutConfig) -> str:
    """The key of BOUNDS for the least precise of an engine's weights, activations and KV cache."""
    number = rollout.quantization.format.removesuffix("_w8a8")
    is_fp8 = number == "fp8" or rollout.kv_cache_dtype.startswith("fp8")
    if number == "int4" or not is_fp8:
        return rollout.dtype if number == "none" else number
    return "fp8"


def compare_engines(
    pairs: Iterable[tuple[Sample, torch.Tensor]],
    *,
    urls: Sequence[str],
    version: int,
    precisions: Precisions,
) -> dict[str, ParityReport]:
    """A report of every engine, by url, from the samples that it generated.

    Each engine is judged by its own samples only. If the samples were pooled, one stale engine
    among many would pass.

    Args:
        pairs: samples with `rollout.engine`, each with the learner's full log-probs [L] float32.
        urls: of all engines that received the update.
        version: of the weights, for messages.

    Raises:
        SyncError: log-probs cannot be compared (`compare`), an engine has no sample among `pairs`,
            or a sample is not from any of these engines.
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
        served = [torch.from_numpy(sample.rollout.rollout_logprobs) for sample, _ in of_engine]
        try:
            reports[url] = compare(
                [values.float()[mask] for values, mask in zip(served, masks, strict=True)],
                [values[mask] for (_, values), mask in zip(of_engine, masks, strict=True)],
                precisions,
                [prompt_of(sample.rollout) for sample, _ in of_engine],
            )
        except SyncError as error:
            raise SyncError(f"engine {url} after update {version}: {error}") from error
    return reports


def prompt_of(rollout: Rollout) -> bytes:
    """Tells whether two rollouts have the same tokens before their responses."""
    return rollout.token_ids[: int(rollout.loss_mask.argmax())].tobytes()


def compare(
    rollout_logprobs: Sequence[torch.Tensor],
    full_logprobs: Sequence[torch.Tensor],
    precisions: Precisions,
    prompts: Sequence[Hashable] | None = None,
) -> ParityReport:
    """Compare the two sides of one engine's samples.

    Args:
        rollout_logprobs: of each sample, [L] floating-point, the engine's log-probs of its tokens.
        full_logprobs: of each sample, [L] floating-point, the learner's of the same tokens.
        prompts: of each sample; None: they all differ.

    Raises:
        SyncError: the log-probs cannot be compared, are not finite, or are -9999 or below (the
            value that an engine's route writes for NaN); or a precision has no bound.
    """
    shapes = [[tuple(each.shape) for each in side] for side in (rollout_logprobs, full_logprobs)]
    if shapes[0] != shapes[1] or any(len(shape) != 1 for shape in shapes[0]):
        raise SyncError(
            f"parity probe: expected tensors of the same shapes [L], got {shapes[0]} and "
            f"{shapes[1]}"
        )
    if not any(each.numel() for each in rollout_logprobs):
        raise SyncError("parity probe: expected at least one token, got none")
    engine, learner = (
        torch.cat(tuple(side)).double().cpu() for side in (rollout_logprobs, full_logprobs)
    )
    for name, values in (("engine", engine), ("learner", learner)):
        bad = ~values.isfinite() | (values <= MISSING_LOGPROB)
        if bad.any():
            position = int(bad.nonzero()[0])
            raise SyncError(
                f"parity probe: expected finite log-probs above {MISSING_LOGPROB}, the {name} gave "
                f"{float(values[position])} for token {position} of {values.numel()}"
            )
    gap = (learner.exp() - engine.exp()).abs()
    lengths = [each.numel() for each in rollout_logprobs]
    gaps: dict[Hashable, float] = {}  # sums of each prompt
    counts: dict[Hashable, int] = {}
    for prompt, own, length in zip(
        range(len(lengths)) if prompts is None else prompts,
        gap.split(lengths),
        lengths,
        strict=True,
    ):
        if length:
            gaps[prompt] = gaps.get(prompt, 0.0) + float(own.sum())
            counts[prompt] = counts.get(prompt, 0) + length
    mean, standard_error = ratio(
        torch.tensor([*gaps.values()], dtype=torch.float64),
        torch.tensor([*counts.values()], dtype=torch.float64),
    )
    relative = (learner - engine).abs() / learner.abs().clamp(min=1.0)
    return ParityReport(
        num_tokens=engine.numel(),
        mean_probability_gap=mean,
        standard_error=standard_error,
        max_probability_gap=float(gap.max()),
        max_relative_logprob_gap=float(relative.max()),
        precisions=precisions,
        bound=precisions.bound(),
    )
