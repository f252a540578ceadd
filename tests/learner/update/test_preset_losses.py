"""The loss of one row under every preset, with the numbers worked by hand: what a preset sets, put
together as the learner does it.

Three sequences of two, one and one sampled tokens a, b | c | d:

    p_theta   0.78  0.12 | 0.495 | 0.55
    p_train   0.6   0.2  | 0.45  | 0.5       r     1.3  0.6  | 1.1  | 1.1
    p_inf     0.1   0.5  | 0.5   | 0.5       rho   6    0.4  | 0.9  | 1
    A         1     1    | -2    | 0.5       delta 0.5  0.3  | 0.05 | 0

PPO's surrogate with a clip to [0.8, 1.24] is 1.24, 0.6 | -2.2 | 0.55; lambda is 0.4.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.config.file import load_config
from megatron_rl.config.presets import PRESETS, dotted
from megatron_rl.learner.passes.forward import RowOutput
from megatron_rl.learner.update.row_correction import BatchScalars, batch_scalars
from megatron_rl.learner.update.row_loss import MiniBatchLoss, StepSettings, UpdateRow
from megatron_rl.records import MicroBatch, RecomputedRow, Sample
from tests.fakes.groups import make_rollout

POLICY, TRAIN, ROLLOUT = (0.78, 0.12, 0.495, 0.55), (0.6, 0.2, 0.45, 0.5), (0.1, 0.5, 0.5, 0.5)
ADVANTAGES, IDS = (1.0, 1.0, -2.0, 0.5), (0, 0, 1, 2)
DUAL_VALUE = 0.4
SAMPLE = Sample(prompt_index=0, sample_index=0, rollout=make_rollout(), reward=0.0, advantage=0.0)
PPO = (1.24 + 0.6) / 2 - 2.2 + 0.55  # the sum of the sequences' means
log = math.log

# The value that is maximised, and the number of sequences or tokens that it is the mean of.
EXPECTED = {
    "grpo": ((1.2 + 0.6) / 2 - 2.2 + 0.55, 3),
    "dapo": (1.28 + 0.6 - 2.2 + 0.55, 4),
    "dr_grpo": ((1.2 + 0.6 - 2.2 + 0.55) / 256, 3),
    # Sequence ratios sqrt(1.3 * 0.6), 1.1 and 1.1; the clip acts on the last one alone.
    "gspo": (math.sqrt(0.78) - 2.2 + 1.0004 * 0.5, 3),
    "cispo": (1.3 * log(0.78) + 0.6 * log(0.12) - 2.2 * log(0.495) + 0.55 * log(0.55), 4),
    # Ratios to the engine 7.8, 0.24 | 0.99 | 1.1; a rose by 0.68, beyond the trust region.
    "dppo_tv": (0 + 0.24 - 2 * 0.99 + 0.5 * 1.1, 4),
    "bypass": ((1.24 + 0.24) / 2 - 2 * 0.99 + 0.5 * 1.1, 3),
    "tis": ((2 * 1.24 + 0.4 * 0.6) / 2 - 0.9 * 2.2 + 0.55, 3),
    "mipu": ((2 * 1.24 + 0.4 * 0.6) / 2 - 0.9 * 2.2 + 0.55, 3),
    "sequence_tis": (2 * (1.24 + 0.6) / 2 - 0.9 * 2.2 + 0.55, 3),  # products 2.4, 0.9 and 1
    "icepop": ((0 + 0) / 2 - 0.9 * 2.2 + 0.55, 3),
    # Bounds 1 + 2.3 * 0.4, 1 + 2.3 * 0.8 | ...
    "cis": ((1.92 * 1.24 + 0.4 * 0.6) / 2 - 0.9 * 2.2 + 0.55, 3),
    "sequence_mask": (2.4 * (1.24 + 0.6) / 2 - 0.9 * 2.2 + 0.55, 3),
    # Geometric means sqrt(2.4), 0.9 and 1: only the last sequence stays.
    "geometric_rejection": (0.55, 1),
    # Mean k3 of the sequences: above 1, 0.9 - 1 - log 0.9 = 0.0054, 0.
    "k3_rejection": (-2.2 + 0.55, 2),
    # A' = 0.8, 0.88 | -2.02 | 0.5
    "dc_grpo": ((1.24 * 0.8 + 0.6 * 0.88) / 2 - 1.1 * 2.02 + 0.55, 3),
    # The same with the test's lambda; the preset's own is 1.
    "dual_grpo": ((1.24 * 0.8 + 0.6 * 0.88) / 2 - 1.1 * 2.02 + 0.55, 3),
    # The mean delta is 0.85 / 4 = 0.2125, so A' is higher by 0.085.
    "dc_grpo_centered": ((1.24 * 0.885 + 0.6 * 0.965) / 2 - 1.1 * 1.935 + 1.1 * 0.585, 3),
    "dc_grpo_penalty": (PPO - 0.4 * ((0.68 + 0.38) / 2 + 0.005 + 0.05), 3),
    "dc_grpo_age_penalty": (PPO - 0.4 * ((0.68 + 0.38) / 2 + 0.005 + 0.05), 3),  # at one lambda
    "dc_grpo_squared_difference": (
        PPO - 0.4 * ((0.68**2 + 0.38**2) / 2 + 0.005**2 + 0.05**2),
        3,
    ),
    "dc_grpo_squared_ratio": (PPO - 0.4 * ((6.8**2 + 0.76**2) / 2 + 0.01**2 + 0.1**2), 3),
    "dc_grpo_squared_log_ratio": (
        PPO - 0.4 * ((log(7.8) ** 2 + log(0.24) ** 2) / 2 + log(0.99) ** 2 + log(1.1) ** 2),
        3,
    ),
    "dc_grpo_tis": ((2 * 1.24 * 0.8 + 0.4 * 0.6 * 0.88) / 2 - 0.9 * 1.1 * 2.02 + 0.55, 3),
}


def row() -> RecomputedRow:
    integers = torch.zeros(4, dtype=torch.int64)
    micro_batch = MicroBatch(
        tokens=integers,
        labels=integers,
        positions=integers,
        loss_mask=integers == 0,
        rollout_logprobs=torch.tensor(ROLLOUT).log(),
        advantages=torch.tensor(ADVANTAGES),
        weight_versions=integers,
        sequence_ids=torch.tensor(IDS),
        cu_seqlens=torch.tensor([0, 2, 3, 4], dtype=torch.int32),
        cu_seqlens_padded=torch.tensor([0, 2, 3, 4], dtype=torch.int32),
        samples=(SAMPLE,) * 3,
    )
    return RecomputedRow(
        micro_batch=micro_batch,
        recomputed_logprobs=torch.tensor(TRAIN).log(),
        is_outside_support=torch.zeros(4, dtype=torch.bool),
    )


def test_every_preset_has_its_numbers():
    # Those with score centering need the engine's heads; test_row_centering.py has their numbers.
    is_centred = {
        name
        for name, preset in PRESETS.items()
        if dotted(preset).get("objective.score_centering.enabled")
    }
    assert set(EXPECTED) == set(PRESETS) - is_centred


@pytest.mark.parametrize("name", EXPECTED)
def test_the_loss_of_a_preset_worked_by_hand(name: str, tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.touch()
    config = load_config(path, [f"objective.preset={name}"]).objective
    known = row()
    scalars = BatchScalars()
    if config.constraint.baseline == "batch":
        alone = SimpleNamespace(batch_reducer=lambda: lambda values, _operation: values)
        scalars = batch_scalars([known], [], config, alone, tolerance=0.0037)
    settings = StepSettings(
        config=config,
        dual_value=DUAL_VALUE if config.constraint.enabled else 0.0,
        tolerance=0.0037,
        scalars=scalars,
        weight_version=0,
        place="step 1, rank 0",
    )
    update = UpdateRow(micro_batch=known.micro_batch, recomputed=known, reference_logprobs=None)
    logprobs = torch.tensor(POLICY).log().requires_grad_()
    output = RowOutput(
        logprobs=logprobs,
        full_logprobs=logprobs,
        entropy=torch.zeros(4),
        is_outside_support=torch.zeros(4, dtype=torch.bool),
    )
    terms = MiniBatchLoss([update], settings, num_left_out=0)(0, output)
    expected, expected_count = EXPECTED[name]
    assert int(terms.count) == expected_count
    assert terms.total.item() == pytest.approx(-expected, rel=2e-6, abs=2e-6)
