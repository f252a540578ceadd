import math

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective.rejection import (
    DIVERGENCES,
    LEVELS,
    off_policy_sequence_mask,
    rejection_mask,
    rejection_metrics,
    veto_mask,
)
from megatron_rl.observe.metrics import reduce

# log rho: sequence 0: 0.2, -0.1; sequence 1: 0.6, -0.6, and a token that was not sampled;
# sequence 2: 0.05; padding.
LOG_RATIOS = torch.tensor([0.2, -0.1, 0.6, -0.6, 0.0, 0.05, 0.0])
IDS = torch.tensor([0, 0, 1, 1, 1, 2, -1])
MASK = torch.tensor([True, True, True, True, False, True, False])
ROLLOUT = torch.tensor([-3.0, -1.0, -2.0, -0.7, math.nan, -2.0, math.nan])
RECOMPUTED = ROLLOUT + LOG_RATIOS


def _alone(tensor, _operation):
    return tensor


def kept_of(divergence, level, lower, upper, recomputed=RECOMPUTED):
    kept = rejection_mask(
        recomputed,
        ROLLOUT,
        MASK,
        IDS,
        divergence=divergence,
        level=level,
        lower=lower,
        upper=upper,
    )
    return kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("divergence", "level", "bounds", "kept"),
    [
        # The bounds of k1 are ratios: exp(0.6) = 1.82, exp(-0.6) = 0.55, exp(0.2) = 1.22.
        ("k1", "token", (0.8, 1.5), [0, 1, 5]),
        ("k1", "token", (0.0, 1.5), [0, 1, 3, 5]),
        ("k1", "sequence_sum", (0.99, 1.07), [2, 3, 5]),  # exp(0.1) = 1.105
        ("k1", "sequence_mean", (0.99, 1.052), [0, 1, 2, 3, 5]),  # exp(0.05) = 1.0513
        ("k1", "sequence_mean", (0.999, 1.001), [2, 3]),  # the plus and minus 0.6 cancel
        ("k1", "sequence_max", (0.8, 1.5), [0, 1, 5]),
        ("k1", "sequence_max", (0.5, 1.1), [5]),
        # k2: 0.02, 0.005; 0.18, 0.18; 0.00125
        ("k2", "token", (0.0, 0.01), [1, 5]),
        ("k2", "sequence_sum", (0.0, 0.02), [5]),
        ("k2", "sequence_mean", (0.0, 0.02), [0, 1, 5]),
        ("k2", "sequence_max", (0.0, 0.1), [0, 1, 5]),
        # k3: 0.0214, 0.0048; 0.2221, 0.1488; 0.00127
        ("k3", "token", (0.0, 0.15), [0, 1, 3, 5]),
        ("k3", "sequence_sum", (0.0, 0.03), [0, 1, 5]),
        ("k3", "sequence_mean", (0.0, 0.186), [0, 1, 2, 3, 5]),
        ("k3", "sequence_mean", (0.0, 0.185), [0, 1, 5]),
        ("k3", "sequence_max", (0.0, 0.02), [5]),
    ],
)
def test_worked_by_hand(divergence, level, bounds, kept):
    assert kept_of(divergence, level, *bounds) == kept


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", LEVELS)
def test_equal_policies_lose_nothing(divergence, level):
    bounds = (1.0, 1.0) if divergence == "k1" else (0.0, 1e-12)
    everything = MASK.nonzero()[:, 0].tolist()
    assert kept_of(divergence, level, *bounds, recomputed=ROLLOUT) == everything
    stays = veto_mask(ROLLOUT, ROLLOUT, MASK, IDS, ratio=0.999, probability=0.0)
    assert torch.equal(stays, MASK)


def test_veto_worked_by_hand():
    log_ratios = torch.tensor([0.0, -9.3, 0.0, -9.1, 0.0, 0.0, 0.0])  # ln 1e-4 is -9.21
    recomputed = ROLLOUT + log_ratios
    stays = veto_mask(recomputed, ROLLOUT, MASK, IDS, ratio=1e-4, probability=0.0)
    assert stays.nonzero()[:, 0].tolist() == [2, 3, 5]
    # p_train of sequence 2 is exp(-2) = 0.135; of the others exp(-3) and less.
    stays = veto_mask(recomputed, ROLLOUT, MASK, IDS, ratio=0.0, probability=0.1)
    assert stays.nonzero()[:, 0].tolist() == [5]
    assert torch.equal(veto_mask(recomputed, ROLLOUT, MASK, IDS, ratio=0, probability=0), MASK)


def test_opsm_worked_by_hand():
    rollout = torch.tensor([-1.0, -1.0, -1.0, -1.0, math.nan, -1.0, math.nan])
    # Mean log(p_inf / p_theta): 0.05, 0.05, -0.3.
    policy = torch.tensor([-1.3, -0.8, -1.1, -1.0, math.nan, -0.7, math.nan])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 0.0])
    for threshold, expected in ((0.04, [2, 3, 5]), (0.06, [0, 1, 2, 3, 5])):
        stays = off_policy_sequence_mask(
            policy, rollout, advantages, MASK, IDS, threshold=threshold
        )
        assert stays.nonzero()[:, 0].tolist() == expected
    stays = off_policy_sequence_mask(rollout, rollout, -torch.ones(7), MASK, IDS, threshold=0.0)
    assert torch.equal(stays, MASK)
    nothing = torch.zeros_like(MASK)
    stays = off_policy_sequence_mask(policy, rollout, advantages, nothing, IDS, threshold=0.0)
    assert not stays.any()


def test_shares_of_tokens_and_sequences():
    kept = MASK & (torch.arange(7) != 0)
    metrics = reduce(rejection_metrics(kept, MASK, IDS, name="rejected"), _alone)
    assert metrics == {
        "correction/rejected_tokens/mean": pytest.approx(1 / 5),
        "correction/rejected_sequences/mean": pytest.approx(1 / 3),
    }
    nothing = torch.zeros(7, dtype=torch.bool)
    assert reduce(rejection_metrics(nothing, nothing, IDS, name="rejected"), _alone) == {}


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"rejection\.divergence"):
        kept_of("k4", "token", 0.0, 2.0)
    with pytest.raises(ConfigError, match=r"rejection\.level"):
        kept_of("k1", "sequence", 0.0, 2.0)
