"""The passes of `Learner`: which log-probs they give, of which rows, and on which ranks."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.errors import BrokenUpdateError
from megatron_rl.learner import learner
from megatron_rl.learner.passes.forward import LossTerms
from megatron_rl.ops import broken_rows
from tests.learner.support.single_rank import TOP_K

CASES = {"tp1": 1, "tp2": 1, "pp2": 1, "dp2": 2, "tp2_pp2": 1}  # the replicas of each
LAST_STAGES = {"tp1": 1, "tp2": 2, "pp2": 1, "dp2": 2, "tp2_pp2": 2}  # ranks on a last stage


@pytest.mark.parametrize("case", CASES)
def test_every_replica_scores_all_samples_of_rank_0(
    case: str, outcome_of: Any, reference_of: Any
) -> None:
    expected = reference_of("qwen3")["logprobs"]
    scored = [each for each in outcome_of("qwen3", case)["scored"] if each]
    assert len(scored) == LAST_STAGES[case]
    for of_rank in scored:
        assert of_rank.keys() == set(range(len(expected)))
        for number, logprobs in of_rank.items():
            scale = expected[number].abs().clamp(min=1.0)
            assert ((logprobs - expected[number]).abs() / scale).max() <= 2e-5


@pytest.mark.parametrize("case", CASES)
def test_without_truncation_full_logprobs_are_the_recomputed_ones(
    case: str, outcome_of: Any
) -> None:
    seen = set()
    for of_rank in outcome_of("qwen3", case)["forward"]:
        assert of_rank["full_logprobs"].keys() == of_rank["logprobs"].keys()
        for number, logprobs in of_rank["logprobs"].items():
            seen.add(number)
            assert torch.equal(of_rank["full_logprobs"][number], logprobs)
    assert len(seen) == 6


def test_with_truncation_only_the_recomputed_logprobs_change(single_rank: dict[str, Any]) -> None:
    whole, truncated = (single_rank["logprobs"][name] for name in ("whole", "truncated"))
    assert torch.equal(whole["full"], whole["recomputed"])
    assert torch.equal(truncated["full"], whole["full"])
    counted = slice(0, 39)
    assert (truncated["recomputed"][counted] > truncated["full"][counted]).all()
    assert TOP_K < 128  # of the vocabulary


def test_a_micro_batch_with_a_broken_row_gets_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = torch.tensor([broken_rows.NO_ROW])
    monkeypatch.setitem(broken_rows._FLAGS, torch.device("cpu"), flag)
    losses = []

    def schedule(parts: Any, rows: Any, on_output: Any, **_: Any) -> list[Any]:
        return [on_output(index, torch.zeros(1, 4, 8)) for index in range(len(rows))]

    def row_loss(index: int, output: Any) -> LossTerms:
        losses.append(index)
        return LossTerms(total=None, count=None, num_kept=1, result=None)

    def output(logits: torch.Tensor, row: str, **settings: Any) -> None:
        if row == "broken":
            flag.fill_(2 * 5 + 1)

    monkeypatch.setattr(learner, "run_schedule", schedule)
    monkeypatch.setattr(learner, "row_output", output)
    nothing = SimpleNamespace(zero_grad_buffer=lambda: None, zero_grad=lambda: None)
    one = SimpleNamespace(
        trained=SimpleNamespace(parts=[nothing], optimizer=nothing),
        geometry=SimpleNamespace(vocab_size=8),
        temperature=1.0,
        truncation=None,
        parallel=SimpleNamespace(
            is_row_head=True,
            cp_group=SimpleNamespace(size=lambda: 1),
            first_problem=lambda own: own,
        ),
        _routers=SimpleNamespace(of_update=lambda rows, balance: None),
        _gradient_problem=lambda: "",
        onload=lambda: None,
    )
    one._terms = partial(learner.Learner._terms, one)
    with pytest.raises(BrokenUpdateError, match="micro-batch 1: logits of row 5"):
        learner.Learner.update(one, ["sound", "broken", "sound"], row_loss)
    assert losses == [0, 2]  # the others are in their collectives: a rank goes on
