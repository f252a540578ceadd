from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM

from megatron_rl.errors import SyncError
from megatron_rl.sync.probe import check_parity

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
    """One model, served in BF16; recomputed in float32, and by learners that differ from it."""
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
    recomputed = sampled_logprobs(models[learner], tokens)
    if learner == "right":
        report = check_parity(engine, recomputed, **BFLOAT16)
        assert report.num_tokens == 48 and report.mean_probability_gap > 1e-4
    else:
        with pytest.raises(SyncError, match="does not serve the published weights"):
            check_parity(engine, recomputed, **BFLOAT16)
