"""The learner against transformers in float32, over model shapes and layouts, packed and not.

The forward pass, the gradients of a real training step and the weights after it; that copies of a
shard stay the same bits; what bfloat16 may differ by; and checkpoints that do not fit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from tests.learner.support.parity_cases import BFLOAT16_CASES, CASES, MOE_CASES, Case
from tests.learner.support.parity_models import LENGTHS, MODELS, MOE_MODELS
from tests.learner.support.parity_ranks import LEARNING_RATE

LOGPROB_TOLERANCE = 2e-5  # times max(1, |logprob|)
GRADIENT_TOLERANCE = 1e-5  # relative norm, tensor by tensor
# Of a router's logits: where two are closer, rounding decides which expert a token is sent to.
ROUTER_MARGIN = 1e-5
MOE_PAIRS = [(model, case) for case in MOE_CASES for model in case.models]
PAIRS = [(model, case) for case in CASES for model in case.models or MODELS] + MOE_PAIRS
BFLOAT16_PAIRS = [(model, case) for case in BFLOAT16_CASES for model in case.models]


def named(pairs: list[tuple[str, Case]]) -> Any:
    names = [f"{model}-{case.name}" for model, case in pairs]
    return pytest.mark.parametrize(("model", "case"), pairs, ids=names)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = relative_error(found[name], tensor)
        assert error <= GRADIENT_TOLERANCE, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("model", MODELS | MOE_MODELS)
def test_the_reference_can_tell_weights_apart(model: str, reference_of: Any) -> None:
    reference = reference_of(model)
    entropy = torch.cat(reference["entropy"]).mean().item()
    most = math.log((MODELS | MOE_MODELS)[model].vocab_size)
    assert 0.2 * most < entropy < 0.7 * most
    assert sorted(LENGTHS)[-2] >= 256
    # Clipping at a norm of 1 has to do something.
    assert sum(grad.square().sum() for grad in reference["gradients"].values()) > 1.5


@named(PAIRS)
def test_logprobs(model: str, case: Case, outcome_of: Any, reference_of: Any) -> None:
    expected, margins = reference_of(model)["logprobs"], reference_of(model)["margins"]
    seen, num_excluded = set(), 0
    for of_rank in outcome_of(model, case.name)["forward"]:
        for number, logprobs in of_rank["logprobs"].items():
            seen.add(number)
            scale = expected[number].abs().clamp(min=1.0)
            errors = (logprobs - expected[number]).abs() / scale
            if margins:
                is_close = margins[number] < ROUTER_MARGIN
                num_excluded += int(is_close.sum())
                errors = errors.masked_fill(is_close, 0.0)
            error = errors.max().item()
            assert error <= LOGPROB_TOLERANCE, f"sequence {number}: {error:.2e}"
    assert seen == set(range(len(expected)))
    assert num_excluded <= 2 * len(margins), f"{num_excluded} tokens between two experts"


@named([pair for pair in PAIRS if not pair[1].is_distributed])
def test_gradients_are_those_of_transformers(
    model: str, case: Case, outcome_of: Any, reference_of: Any
) -> None:
    outcome, gradients = outcome_of(model, case.name), reference_of(model)["gradients"]
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in gradients.values()))
    assert outcome["metrics"]["learner/grad_norm"] == pytest.approx(norm, rel=1e-6)
    clip = 1.0 / (norm + 1e-6)
    assert_close(outcome["gradients"], {name: clip * grad for name, grad in gradients.items()})


@named([pair for pair in PAIRS if not pair[1].is_distributed])
def test_gradients_agree_between_layouts(model: str, case: Case, outcome_of: Any) -> None:
    assert_close(outcome_of(model, case.name)["gradients"], outcome_of(model, "tp1")["gradients"])


@named(PAIRS)
def test_updated_weights_agree_between_layouts(model: str, case: Case, outcome_of: Any) -> None:
    found, expected = outcome_of(model, case.name), outcome_of(model, "tp1")
    assert_close(found["weights_after"], expected["weights_after"])
    moved = (
        found["weights_after"]["model.norm.weight"] - found["weights_before"]["model.norm.weight"]
    )
    assert 0.1 * LEARNING_RATE < moved.abs().max() <= 1.001 * LEARNING_RATE


@named(PAIRS)
def test_activations_are_computed_again_as_the_setting_says(
    model: str, case: Case, outcome_of: Any
) -> None:
    """A row is recomputed once and trained on once; its backward pass may run layers again."""
    again = {"none": (), "selective": ("attention", "mlp"), "full": ("attention", "mlp", "layer")}
    calls = outcome_of(model, case.name)["calls_of_a_row"]
    expected = dict.fromkeys(("attention", "mlp", "layer"), 2.0)
    assert calls == expected | dict.fromkeys(again[case.recomputation], 3.0)


@named(PAIRS + BFLOAT16_PAIRS)
def test_copies_of_a_shard_are_the_same_bits(model: str, case: Case, outcome_of: Any) -> None:
    """Over DP all shards, over TP the norms, over PP the tied embedding; after a step."""
    digests: dict[tuple[str, str, int | None], list[str]] = defaultdict(list)
    for of_rank in outcome_of(model, case.name)["digests"]:
        for what, shards in of_rank.items():
            for name, tp_rank, digest in shards:
                digests[what, name, tp_rank].append(digest)
    for key, found in digests.items():
        assert len(set(found)) == 1, f"{key}: {len(set(found))} different copies"
    norms = digests["weights", "model.norm.weight", None]
    assert len(norms) == case.world_size // case.pipeline


@named(BFLOAT16_PAIRS)
def test_bfloat16_stays_within_its_noise(
    model: str, case: Case, outcome_of: Any, reference_of: Any
) -> None:
    """No more of it than transformers' own model in bfloat16 has, and without a direction."""
    outcome, reference = outcome_of(model, case.name), reference_of(model)
    merged = {n: v for of_rank in outcome["forward"] for n, v in of_rank["logprobs"].items()}
    exact = torch.cat(reference["logprobs"])
    noise = torch.cat([merged[number] for number in range(len(LENGTHS))]) - exact
    usual = torch.cat(reference["bfloat16_logprobs"]) - exact
    assert 0.5 < noise.abs().mean() / usual.abs().mean() < 1.3
    assert noise.abs().max() < 2 * usual.abs().max()
    assert noise.mean().abs() < 0.2 * noise.abs().mean()
    norm = outcome_of(model, "tp1")["metrics"]["learner/grad_norm"]
    assert outcome["metrics"]["learner/grad_norm"] == pytest.approx(norm, rel=0.02)


@named(BFLOAT16_PAIRS)
def test_bfloat16_has_float32_main_weights(model: str, case: Case, outcome_of: Any) -> None:
    outcome, exact = outcome_of(model, case.name), outcome_of(model, "tp1")
    main = outcome["main"]
    assert main["dtypes"] == main["state_dtypes"] == {"torch.float32"}
    assert main["is_rounded_main"], "a weight is its main weight, rounded"
    changed = 0
    for name, tensor in outcome["weights_after"].items():
        assert tensor.dtype is torch.bfloat16
        changed += (tensor != outcome["weights_before"][name]).sum().item()
        # What the step took it to, from where rounding had put it: half a unit each time.
        distance = (tensor.float() - exact["weights_after"][name]).abs()
        unit = exact["weights_after"][name].abs().clamp(min=LEARNING_RATE) * 2**-7
        assert (distance <= unit + 2 * LEARNING_RATE).all(), name
    assert changed > 1000


REFUSALS = {
    "wrong_shape": (
        "DataError",
        "checkpoint tensor model.layers.3.mlp.down_proj.weight: expected shape [64, 96] from "
        "config.json, got [64, 95]",
    ),
    "missing_tensor": ("DataError", "expected a tensor named model.layers.3.mlp.down_proj.weight"),
    "truncated": ("DataError", "model.safetensors: expected a whole safetensors file, got: "),
    "missing_file": ("DataError", "expected model.safetensors or model.safetensors.index.json"),
    "wrong_heads": ("DataError", "self_attn.k_proj.weight: expected shape [64, 64]"),
    "yarn_factor": ("ConfigError", "expected YaRN's attention factor 1.138629 for a scale of 4.0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused(name: str, outcome_of: Any) -> None:
    refusals = outcome_of("refusals", "tp1")
    assert refusals.keys() == REFUSALS.keys(), "each is refused, none else is there"
    kind, text = REFUSALS[name]
    assert refusals[name][0] == kind
    assert text in refusals[name][1]
