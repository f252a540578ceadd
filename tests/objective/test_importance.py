import math

import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.objective.importance import (
    cis_bound,
    importance_weights,
    weight_mean,
    weight_metrics,
)
from megatron_rl.observe.metrics import merge, reduce

# Sequence 0: ratios 4, 1/2, 1/2 (product 1, geometric mean 1); sequence 1: 1/8, and a token that
# was not sampled; sequence 2: 3, 3 (product 9, geometric mean 3); padding.
RATIOS = torch.tensor([4.0, 0.5, 0.5, 0.125, 1.0, 3.0, 3.0, 1.0])
IDS = torch.tensor([0, 0, 0, 1, 1, 2, 2, -1])
MASK = torch.tensor([True, True, True, True, False, True, True, False])
ROLLOUT = torch.tensor([-3.0, -1.0, -1.0, -0.5, math.nan, -2.0, -2.0, math.nan])
RECOMPUTED = ROLLOUT + RATIOS.log()


def _alone(tensor, _operation):
    return tensor


def weigh(level, mode, lower=0.0, upper=2.0, recomputed=RECOMPUTED):
    return importance_weights(
        recomputed, ROLLOUT, MASK, IDS, level=level, mode=mode, lower=lower, upper=upper
    )


@pytest.mark.parametrize(
    ("level", "mode", "bounds", "expected", "outside"),
    [
        ("token", "truncate", (0.0, 2.0), [2, 0.5, 0.5, 0.125, 0, 2, 2, 0], [0, 5, 6]),
        ("token", "truncate", (0.25, 3.5), [3.5, 0.5, 0.5, 0.25, 0, 3, 3, 0], [0, 3]),
        # IcePop's bounds
        ("token", "mask", (0.5 - 1e-6, 3.5), [0, 0.5, 0.5, 0, 0, 3, 3, 0], [0, 3]),
        ("sequence_sum", "truncate", (0.0, 2.0), [1, 1, 1, 0.125, 0, 2, 2, 0], [5, 6]),
        ("sequence_sum", "mask", (0.5, 5.0), [1, 1, 1, 0, 0, 0, 0, 0], [3, 5, 6]),
        ("sequence_mean", "truncate", (0.5, 4.0), [1, 1, 1, 0.5, 0, 3, 3, 0], [3]),
        ("sequence_mean", "mask", (0.5, 2.0), [1, 1, 1, 0, 0, 0, 0, 0], [3, 5, 6]),
    ],
)
def test_worked_by_hand(level, mode, bounds, expected, outside):
    weights, is_outside = weigh(level, mode, *bounds)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert is_outside.nonzero()[:, 0].tolist() == outside


@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_equal_policies_weigh_exactly_one(level, mode):
    weights, is_outside = weigh(level, mode, 1.0, 1.0, recomputed=ROLLOUT)
    assert torch.equal(weights, MASK.float())
    assert not is_outside.any()


def test_ratios_that_overflow_are_clamped():
    far = torch.tensor([0.0, -900.0])
    weights, _ = importance_weights(
        far,
        far.flip(0),
        torch.ones(2, dtype=torch.bool),
        torch.tensor([0, 1]),
        level="token",
        mode="truncate",
        lower=0.0,
        upper=1e12,
    )
    assert weights.tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-6)


def test_cis_worked_by_hand():
    # p_train = 1/2, 1/2, 0.9, 0.9 and 1, which the bounds 2.15, 2.15, 1.23, 1.23 and 1 + 2.3 *
    # 0.005 = 1.0115 belong to. A low ratio is never raised; a masked token has no weight.
    train = torch.tensor([0.5, 0.5, 0.9, 0.9, 1.0, math.nan])
    rollout = torch.tensor([0.2, 0.8, 0.8, 0.3, 0.98, 0.5])
    mask = torch.tensor([True] * 5 + [False])
    recomputed = train.log().requires_grad_()
    bound = cis_bound(recomputed, slope=2.3, floor=5e-3)
    assert bound[:5].tolist() == pytest.approx([2.15, 2.15, 1.23, 1.23, 1.0115], rel=1e-6)
    settings = {"level": "token", "mode": "cis", "lower": 0.0, "upper": bound}
    ids = torch.zeros(6, dtype=torch.int64)
    weights, is_outside = importance_weights(recomputed, rollout.log(), mask, ids, **settings)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    expected = [2.15, 0.625, 1.125, 1.23, 1.0115, 0.0]
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert is_outside.tolist() == [True, False, False, True, True, False]
    nothing = torch.zeros(6, dtype=torch.bool)
    weights, is_outside = importance_weights(recomputed, rollout.log(), nothing, ids, **settings)
    assert weights.tolist() == [0.0] * 6 and not is_outside.any()


def test_cis_leaves_one_displacement_of_the_log_odds_alone_at_every_confidence():
    """With logit p_train = logit p_inf + e, rho - 1 is (e^e - 1) (1 - p_train): a slope of e^e - 1
    truncates a larger displacement and no smaller one.
    """
    train = torch.tensor([0.02, 0.3, 0.7, 0.99], dtype=torch.float64)
    ids, mask = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    bound = cis_bound(train.log(), slope=2.3, floor=0.0)
    for displacement, is_bounded in ((math.log(3.2), False), (math.log(3.4), True)):
        rollout = torch.special.expit(torch.logit(train) - displacement)
        tokens = (train.log(), rollout.log(), mask, ids)
        _, is_outside = importance_weights(
            *tokens, level="token", mode="cis", lower=0.0, upper=bound
        )
        assert is_outside.tolist() == [is_bounded] * 4


def test_what_batch_normalisation_divides_by():
    weights, _ = weigh("token", "truncate")
    mean = weight_mean(weights, MASK, IDS, level="token")
    assert (float(mean.sum), mean.count) == (7.125, 6)
    # A sequence with a kept token counts once; sequence 1 was rejected.
    kept = MASK & (IDS != 1)
    weights, _ = weigh("sequence_sum", "truncate")
    mean = weight_mean(weights, kept, IDS, level="sequence_sum")
    assert (float(mean.sum), mean.count) == (3.0, 2)


def test_metrics_do_not_depend_on_how_tokens_are_shared_out():
    weights, is_outside = weigh("token", "truncate")
    expected = reduce(weight_metrics(weights, is_outside, MASK), _alone)
    values = [2, 0.5, 0.5, 0.125, 2, 2]
    mean = sum(values) / 6
    assert expected["correction/weight/mean"] == pytest.approx(mean)
    spread = math.sqrt(sum((each - mean) ** 2 for each in values) / 6)
    assert expected["correction/weight/std"] == pytest.approx(spread)
    assert (expected["correction/weight/min"], expected["correction/weight/max"]) == (0.125, 2.0)
    assert expected["correction/outside_bounds/mean"] == pytest.approx(3 / 6)
    size = mean**2 / (sum(each**2 for each in values) / 6)
    assert expected["correction/effective_sample_size"] == pytest.approx(size)
    nothing = weight_metrics(torch.zeros(3), torch.zeros(3).bool(), torch.zeros(3).bool())
    assert reduce(nothing, _alone) == {}
    parts = [
        weight_metrics(weights[part], is_outside[part], MASK[part])
        for part in (slice(0, 2), slice(2, 5), slice(5, 8))
    ]
    got = reduce(merge([*parts, nothing]), _alone)
    assert got == pytest.approx(expected)


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"importance\.level"):
        weigh("sequence", "mask")
    with pytest.raises(ConfigError, match=r"importance\.mode"):
        weigh("token", "clip")
