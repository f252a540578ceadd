from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config import QuantizationConfig, RolloutConfig
from megatron_rl.errors import SyncError
from megatron_rl.records import Rollout, Sample
from megatron_rl.sync.probe import (
    ParityReport,
    Precisions,
    compare,
    compare_engines,
    engine_precision,
)
from tests.sync.tiny_checkpoints import write_checkpoint

FLOAT32 = Precisions(engine="float32", learner="float32", tolerance=0.0)
BFLOAT16 = Precisions(engine="bfloat16", learner="float32", tolerance=0.0)


def report_of(engine: torch.Tensor, learner: torch.Tensor, precisions: Precisions) -> ParityReport:
    """Of samples of one token each."""
    return compare(list(engine.split(1)), list(learner.split(1)), precisions)


def test_report_by_hand():
    engine = torch.tensor([math.log(0.5), math.log(0.2), -4.0])
    learner = torch.tensor([math.log(0.53), math.log(0.2), -4.4])
    report = report_of(engine, learner, BFLOAT16)
    assert report.num_tokens == 3
    gaps = [0.03, 0.0, math.exp(-4.0) - math.exp(-4.4)]
    mean = sum(gaps) / 3
    assert report.mean_probability_gap == pytest.approx(mean, rel=1e-5)
    squares = sum((gap - mean) ** 2 for gap in gaps)
    assert report.standard_error == pytest.approx(math.sqrt(squares / 2 / 3), rel=1e-5)
    assert report.max_probability_gap == pytest.approx(0.03, rel=1e-5)
    assert report.max_relative_logprob_gap == pytest.approx(0.4 / 4.4, rel=1e-5)
    assert not report.is_above


def test_the_standard_error_is_over_the_samples():
    """Gaps 0.02 and 0.02, 0.06 in two samples: means of 1 and 2 tokens, R = 0.10 / 3; the residuals
    are 0.02 - R and 0.08 - 2 R, both 0.04/3 apart from 0; se^2 = 2/1 * 2 * (0.04/3)^2 / 9.
    """
    engine = [torch.tensor([0.5]).log(), torch.tensor([0.5, 0.5]).log()]
    learner = [torch.tensor([0.52]).log(), torch.tensor([0.52, 0.56]).log()]
    report = compare(engine, learner, BFLOAT16)
    assert report.mean_probability_gap == pytest.approx(0.10 / 3, rel=1e-5)
    assert report.standard_error == pytest.approx(2 * (0.04 / 3) / 3, rel=1e-5)


def test_a_mean_above_its_bound_by_chance_is_not_certain():
    """One token of 14 with a gap of 0.25: a mean of 0.0179 > 0.015, se 0.0179."""
    engine = torch.full((14,), math.log(0.5))
    learner = engine.clone()
    learner[3] = math.log(0.75)
    report = report_of(engine, learner, BFLOAT16)
    assert report.mean_probability_gap == pytest.approx(0.25 / 14, rel=1e-5)
    assert report.standard_error == pytest.approx(0.25 / 14, rel=1e-5)
    assert report.is_above and not report.is_certain
    # The same mean, of gaps that are all about as large.
    learner = torch.log(0.5 + 0.25 / 14 * torch.tensor([0.9, 1.1] * 7))
    report = report_of(engine, learner, BFLOAT16)
    assert report.is_above and report.is_certain
    assert "0.0179 +- 0.0005, 6 standard errors above it, over 14 tokens" in report.complaint()


@pytest.mark.parametrize("logprob", [-0.001, -0.7, -12.0])
def test_float32_bound_is_relative_above_one(logprob):
    engine = torch.full((48,), -1.0, dtype=torch.float64)
    engine[17] = logprob
    scale = 2e-5 * max(1.0, abs(logprob))
    for factor, is_wrong in ((0.9, False), (-0.9, False), (1.1, True), (-1.1, True)):
        learner = engine.clone()
        learner[17] += factor * scale
        report = report_of(engine, learner, FLOAT32)
        assert (report.is_above, report.is_certain) == (is_wrong, is_wrong)
    assert "does not serve the published weights" in report.complaint()


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf, -9999.0, -10000.0])
@pytest.mark.parametrize("side", ["engine", "learner"])
def test_values_that_are_no_logprobs(bad, side):
    engine, learner = torch.full((4,), -1.0), torch.full((4,), -1.0)
    (engine if side == "engine" else learner)[2] = bad
    with pytest.raises(SyncError, match=f"the {side} gave .* for token 2 of 4"):
        report_of(engine, learner, Precisions(engine="int8", learner="float32", tolerance=1e9))


def test_a_given_tolerance_is_of_the_mean_probability_gap():
    engine, learner = torch.full((4,), math.log(0.5)), torch.full((4,), math.log(0.51))
    for tolerance, is_above in ((0.011, False), (0.009, True)):
        precisions = Precisions(engine="float32", learner="float32", tolerance=tolerance)
        report = report_of(engine, learner, precisions)
        assert (report.is_above, report.is_certain) == (is_above, is_above)
    assert "mean |p - p| of at most 0.009" in report.complaint()


@pytest.mark.parametrize(
    ("first", "second"), [([3], [4]), ([(2, 2)], [(2, 2)]), ([0], [0]), ([2, 1], [1, 2]), ([], [])]
)
def test_shapes(first, second):
    with pytest.raises(SyncError, match="parity probe: expected"):
        compare([torch.zeros(n) for n in first], [torch.zeros(n) for n in second], FLOAT32)


def test_an_unknown_precision_needs_a_tolerance():
    logprobs = torch.full((4,), -1.0)
    with pytest.raises(SyncError, match="got 'nvfp4'"):
        report_of(logprobs, logprobs, Precisions(engine="nvfp4", learner="bfloat16", tolerance=0.0))
    report_of(logprobs, logprobs, Precisions(engine="nvfp4", learner="bfloat16", tolerance=0.1))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    """One model as an engine serves it, in BF16; the learner's in float32; and two wrong ones."""
    root = tmp_path_factory.mktemp("models")
    folders = [write_checkpoint(root / str(seed), "tied", seed) for seed in (1, 2)]
    right, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    swapped, stale = copy.deepcopy(right), copy.deepcopy(right)
    layers = swapped.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    stale.lm_head.weight = other.lm_head.weight
    served = copy.deepcopy(right).bfloat16()
    return {"served": served, "right": right, "swapped layers": swapped, "stale head": stale}


def sampled_logprobs(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Of the last 12 of each row of `tokens`, [12] each."""
    with torch.no_grad():
        logprobs = model(tokens).logits[:, :-1].float().log_softmax(-1)
    return list(logprobs.gather(-1, tokens[:, 1:, None])[:, -12:, 0])


@pytest.mark.parametrize("learner", ["right", "swapped layers", "stale head"])
def test_noise_passes_and_mistakes_do_not(models, learner):
    """On as many tokens as the probe has when it has asked again."""
    torch.manual_seed(0)
    prompts = torch.randint(3, 128, (20, 16))
    tokens = models["served"].generate(
        prompts, do_sample=True, top_k=0, max_new_tokens=12, min_new_tokens=12
    )
    engine = sampled_logprobs(models["served"], tokens)
    full = sampled_logprobs(models[learner], tokens)
    report = compare(engine, full, BFLOAT16)
    print(f"{learner}: {report.mean_probability_gap:.4f} +- {report.standard_error:.4f}")
    assert report.num_tokens == 240 and report.mean_probability_gap > 1e-4
    assert report.is_certain == (learner != "right")
    # The first 48 tokens are enough to ask again.
    first = compare(engine[:4], full[:4], BFLOAT16)
    assert first.is_above == (learner != "right")


def sample(engine: str, logprob: float) -> Sample:
    """Two prompt tokens and two sampled ones."""
    rollout = Rollout(
        token_ids=(1, 2, 3, 4),
        loss_mask=(False, False, True, True),
        rollout_logprobs=(0.0, 0.0, logprob, logprob),
        weight_versions=(-1, -1, 5, 5),
        finish_reason="stop",
        text="",
        engine=engine,
    )
    return Sample(prompt_index=0, sample_index=0, rollout=rollout, reward=0.0, advantage=0.0)


URLS = ("http://one", "http://two")
HALF = math.log(0.5)
LEARNER = torch.tensor([-77.0, -77.0, HALF, HALF])  # of the prompt's tokens nothing is compared


def test_every_engine_has_its_own_report():
    pairs = [(sample(URLS[1], HALF), LEARNER), (sample(URLS[0], math.log(0.51)), LEARNER)]
    pairs.append((sample(URLS[1], math.log(0.505)), LEARNER))
    reports = compare_engines(iter(pairs), urls=URLS, version=5, precisions=BFLOAT16)
    assert list(reports) == list(URLS)
    assert [report.num_tokens for report in reports.values()] == [2, 4]
    gaps = [report.mean_probability_gap for report in reports.values()]
    assert gaps == pytest.approx([0.01, 0.0025], rel=1e-4)


def test_one_stale_engine_among_many_is_certain():
    pairs = [(sample(URLS[0], HALF), LEARNER)] * 99 + [
        (sample(URLS[1], math.log(0.6)), LEARNER)
    ] * 2
    served = torch.cat([torch.from_numpy(s.rollout.rollout_logprobs)[2:] for s, _ in pairs])
    pooled = report_of(served, torch.full((202,), HALF), BFLOAT16)
    assert not pooled.is_above
    reports = compare_engines(pairs, urls=URLS, version=5, precisions=BFLOAT16)
    assert [report.is_certain for report in reports.values()] == [False, True]


def test_an_engine_without_samples_and_a_sample_without_an_engine():
    settings = {"urls": URLS, "version": 5, "precisions": BFLOAT16}
    with pytest.raises(SyncError, match=r"engine http://two after update 5: .*at least one token"):
        compare_engines([(sample(URLS[0], HALF), LEARNER)], **settings)
    for stranger in ("", "http://three"):
        with pytest.raises(SyncError, match=f"samples of http://one, http://two, .*'{stranger}'"):
            compare_engines([(sample(stranger, HALF), LEARNER)], **settings)


@pytest.mark.parametrize(
    ("dtype", "format", "kv_cache", "expected"),
    [
        ("float32", "none", "auto", "float32"),
        ("bfloat16", "none", "auto", "bfloat16"),
        ("bfloat16", "none", "fp8", "fp8"),
        ("bfloat16", "int8_w8a8", "auto", "int8"),
        ("bfloat16", "int8", "fp8", "fp8"),
        ("bfloat16", "fp8", "auto", "fp8"),
        ("bfloat16", "int4", "fp8", "int4"),
    ],
)
def test_the_least_precise_part_of_an_engine_counts(dtype, format, kv_cache, expected):
    quantization = QuantizationConfig(format=format)
    rollout = RolloutConfig(dtype=dtype, kv_cache_dtype=kv_cache, quantization=quantization)
    assert engine_precision(rollout) == expected
