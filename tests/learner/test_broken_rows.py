"""Where the learner looks for broken rows of a GPU: behind every micro-batch's forward pass, before
its loss, and at the end of a recomputation.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.learner import learner
from megatron_rl.learner.passes import recompute
from megatron_rl.ops import broken_rows

CPU = torch.device("cpu")


@pytest.fixture
def flag(monkeypatch):
    made = torch.tensor([broken_rows.NO_ROW])
    monkeypatch.setitem(broken_rows._FLAGS, CPU, made)
    return made


def test_a_micro_batch_with_a_broken_row_gets_no_loss(flag, monkeypatch):
    losses = []

    def schedule(model, rows, on_output, *, forward_only):
        return [on_output(index, torch.zeros(1, 4, 8)) for index in range(len(rows))]

    def output(logits, row, **settings):
        if row == "broken":
            flag.fill_(2 * 5 + 1)

    monkeypatch.setattr(learner, "run_schedule", schedule)
    monkeypatch.setattr(learner, "row_output", output)
    nothing = SimpleNamespace(zero_grad_buffer=lambda: None, zero_grad=lambda: None)
    place = {"temperature": 1.0, "truncation": None, "parallel": None}
    geometry = SimpleNamespace(vocab_size=8)
    one = SimpleNamespace(model=nothing, optimizer=nothing, geometry=geometry, **place)
    with pytest.raises(DivergenceError, match="micro-batch 1: logits of row 5"):
        learner.Learner.update(
            one, ["sound", "broken", "sound"], lambda index, _: losses.append(index)
        )
    assert losses == [0]


def test_a_recomputation_ends_with_the_check(flag, monkeypatch):
    monkeypatch.setattr(recompute, "run_schedule", lambda *given, **settings: ["logprobs"])
    given = {"temperature": 1.0, "vocab_size": 8, "parallel": SimpleNamespace(device=CPU)}
    assert recompute.recompute_logprobs(None, ["row"], **given) == ["logprobs"]
    flag.fill_(2 * 4)
    with pytest.raises(DataError, match="recomputation: label of row 4"):
        recompute.recompute_logprobs(None, ["row"], **given)
