"""A checkpoint of a mixture of experts goes on in any layout, and has the keys of Transformer
Engine's layers. What the ranks do is in expert_checkpoint_ranks.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.learner.support.comparison import relative_difference
from tests.learner.support.expert_checkpoint_ranks import KINDS, LAYOUTS
from tests.support.models import write_tiny_experts
from tests.support.ranks import run_module

# Relative norm of a weight after the next step, between layouts; of a bfloat16 weight one rounding.
NOISE = {"float32": 1e-5, "bfloat16_distributed": 4e-3}

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What the ranks wrote, by the name of the file; two ranks first, who save."""
    out = tmp_path_factory.mktemp("expert_checkpoints")
    model, rollouts = out / "model", out / "rollouts"
    write_tiny_experts(model)
    run_module("tests.learner.recorded", model, rollouts, ranks=0)
    for world_size in (2, 1):
        paths = (model, rollouts, out)
        run_module("tests.learner.support.expert_checkpoint_ranks", *paths, ranks=world_size)
    return {path.stem: torch.load(path, weights_only=False) for path in out.glob("*.pt")}


every_way_on = pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind.name, layout) for kind in KINDS for layout in LAYOUTS],
)


@every_way_on
def test_every_layout_holds_what_was_saved_bit_for_bit(
    kind: str, layout: str, outcomes: Outcomes
) -> None:
    saved, loaded = outcomes[f"{kind}.uninterrupted"], outcomes[f"{kind}.{layout}"]
    assert loaded["tensors"].keys() == saved["tensors"].keys()
    assert loaded["counts"] == saved["counts"]
    moments = [name for name in saved["tensors"] if "exp_avg" in name and "experts" in name]
    assert moments
    for name, tensor in saved["tensors"].items():
        other = loaded["tensors"][name]
        if other.shape != tensor.shape:  # a vocabulary padded to a multiple of 128 x TP
            assert "embedding" in name or "output_layer" in name
            rows = min(len(other), len(tensor))
            assert not tensor[rows:].any()
            assert not other[rows:].any()
            other, tensor = other[:rows], tensor[:rows]
        assert torch.equal(other, tensor), name


@every_way_on
def test_the_next_step_is_that_of_an_uninterrupted_run(
    kind: str, layout: str, outcomes: Outcomes
) -> None:
    saved, loaded = outcomes[f"{kind}.uninterrupted"], outcomes[f"{kind}.{layout}"]
    assert loaded["weights"].keys() == saved["weights"].keys()
    for name, tensor in saved["weights"].items():
        assert relative_difference(loaded["weights"][name], tensor) <= NOISE[kind], name


def test_the_keys_are_those_of_transformer_engine(outcomes: Outcomes) -> None:
    """In its layers the norm before the experts is a module of its own, and experts have one key
    for all, which the layers of both kinds share.
    """
    names = outcomes["float32.uninterrupted"]["tensors"].keys()
    of_model = {name for name in names if ".state." not in name}
    assert of_model == {
        "embedding.word_embeddings.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.self_attention.k_layernorm.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.pre_mlp_layernorm.weight",
        "decoder.layers.mlp.router.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }
