from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config import QuantizationConfig, RolloutConfig
from megatron_rl.errors import SyncError
from megatron_rl.records import Rollout, Sample
from megatron_rl.sync.probe import check_engines, check_parity, engine_precision
from tests.sync.tiny_checkpoints import write_checkpoint

FLOAT32 = {"engine_dtype": "float32", "learner_dtype": "float32", "tolerance": 0.0}
BFLOAT16 = {"engine_dtype": "bfloat16", "learner_dtype": "float32", "tolerance": 0.0}


def test_report_by_hand():
    engine = torch.tensor([math.log(0.5), math.log(0.2), -4.0])
    learner = torch.tensor([math.log(0.53), math.log(0.2), -4.4])
    report = check_parity(engine, learner, **BFLOAT16)
    assert report.num_tokens == 3
    gaps = [0.03, 0.0, math.exp(-4.0) - math.exp(-4.4)]
    assert report.mean_probability_gap == pytest.approx(sum(gaps) / 3, rel=1e-5)
    assert report.max_probability_gap == pytest.approx(0.03, rel=1e-5)
    assert report.max_relative_logprob_gap == pytest.approx(0.4 / 4.4, rel=1e-5)


@pytest.mark.parametrize("logprob", [-0.001, -0.7, -12.0])
def test_float32_bound_is_relative_above_one(logprob):
    engine = torch.full((48,), -1.0, dtype=torch.float64)
    engine[17] = logprob
    scale = 2e-5 * max(1.0, abs(logprob))
    for factor, is_fine in ((0.9, True), (-0.9, True), (1.1, False), (-1.1, False)):
        learner = engine.clone()
        learner[17] += factor * scale
        if is_fine:
            check_parity(engine, learner, **FLOAT32)
        else:
            with pytest.raises(SyncError, match="does not serve the published weights"):
                check_parity(engine, learner, **FLOAT32)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf, -9999.0, -10000.0])
@pytest.mark.parametrize("side", ["engine", "learner"])
def test_values_that_are_no_logprobs(bad, side):
    engine, learner = torch.full((4,), -1.0), torch.full((4,), -1.0)
    (engine if side == "engine" else learner)[2] = bad
    with pytest.raises(SyncError, match=f"the {side} gave .* for token 2 of 4"):
        check_parity(engine, learner, engine_dtype="int8", learner_dtype="float32", tolerance=1e9)


def test_a_given_tolerance_is_of_the_mean_probability_gap():
    engine, learner = torch.full((4,), math.log(0.5)), torch.full((4,), math.log(0.51))
    check_parity(engine, learner, engine_dtype="float32", learner_dtype="float32", tolerance=0.011)
    with pytest.raises(SyncError, match=r"mean \|p - p\| of at most 0\.009"):
        check_parity(
            engine, learner, engine_dtype="float32", learner_dtype="float32", tolerance=0.009
        )


@pytest.mark.parametrize(("first", "second"), [((3,), (4,)), ((2, 2), (2, 2)), ((0,), (0,))])
def test_shapes(first, second):
    with pytest.raises(SyncError, match="parity probe: expected"):
        check_parity(torch.zeros(first), torch.zeros(second), **FLOAT32)


def test_an_unknown_precision_needs_a_tolerance():
    logprobs = torch.full((4,), -1.0)
    precisions = {"engine_dtype": "nvfp4", "learner_dtype": "bfloat16"}
    with pytest.raises(SyncError, match="got 'nvfp4'"):
        check_parity(logprobs, logprobs, **precisions, tolerance=0.0)
    check_parity(logprobs, logprobs, **precisions, tolerance=0.1)


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


def sampled_logprobs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of the last 12 of each row of `tokens`, [rows, length]."""
    with torch.no_grad():
        logprobs = model(tokens).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, tokens[:, 1:, None])[:, -12:, 0].flatten()


@pytest.mark.parametrize("learner", ["right", "swapped layers", "stale head"])
def test_noise_passes_and_mistakes_do_not(models, learner):
    torch.manual_seed(0)
    prompts = torch.randint(3, 128, (4, 16))
    tokens = models["served"].generate(
        prompts, do_sample=True, top_k=0, max_new_tokens=12, min_new_tokens=12
    )
    engine = sampled_logprobs(models["served"], tokens)
    full = sampled_logprobs(models[learner], tokens)
    if learner == "right":
        report = check_parity(engine, full, **BFLOAT16)
        assert report.num_tokens == 48 and report.mean_probability_gap > 1e-4
    else:
        with pytest.raises(SyncError, match="does not serve the published weights"):
            check_parity(engine, full, **BFLOAT16)


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
    reports = check_engines(iter(pairs), urls=URLS, version=5, **BFLOAT16)
    assert list(reports) == list(URLS)
    assert [report.num_tokens for report in reports.values()] == [2, 4]
    gaps = [report.mean_probability_gap for report in reports.values()]
    assert gaps == pytest.approx([0.01, 0.0025], rel=1e-4)


def test_one_stale_engine_among_many_is_named():
    pairs = [(sample(URLS[0], HALF), LEARNER)] * 99 + [(sample(URLS[1], math.log(0.6)), LEARNER)]
    served = torch.cat([torch.tensor(s.rollout.rollout_logprobs)[2:] for s, _ in pairs])
    check_parity(served, torch.full((200,), HALF), **BFLOAT16)  # pooled, it would pass
    with pytest.raises(SyncError, match=r"^engine http://two after update 5: parity probe: .*0\.1"):
        check_engines(pairs, urls=URLS, version=5, **BFLOAT16)


def test_an_engine_without_samples_and_a_sample_without_an_engine():
    with pytest.raises(SyncError, match=r"engine http://two after update 5: .*at least one token"):
        check_engines([(sample(URLS[0], HALF), LEARNER)], urls=URLS, version=5, **BFLOAT16)
    for stranger in ("", "http://three"):
        with pytest.raises(SyncError, match=f"samples of http://one, http://two, .*'{stranger}'"):
            check_engines([(sample(stranger, HALF), LEARNER)], urls=URLS, version=5, **BFLOAT16)


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
