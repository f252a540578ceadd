"""Figures of the gap, by hand, by definition, and however the tokens are laid out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from megatron_rl.objective.discrepancy import DiscrepancySum, discrepancy
from megatron_rl.objective.gap_metrics import discrepancy_metrics
from megatron_rl.observe.metrics import Metric, merge, reduce

LN2 = math.log(2)
LN3 = math.log(3)


def figures_of(*parts: dict[str, Metric]) -> dict[str, float]:
    return reduce(merge(parts), lambda values, _operation: values)


def metrics_of(
    recomputed: Any, rollout: Any, mask: Any = None, *, ids: Any = None, versions: Any = None
) -> dict[str, Metric]:
    """Of one sequence, sampled by version 7, unless told otherwise; recomputed by version 7."""
    return sum_and_metrics_of(recomputed, rollout, mask, ids=ids, versions=versions)[1]


def sum_and_metrics_of(
    recomputed: Any, rollout: Any, mask: Any = None, *, ids: Any = None, versions: Any = None
) -> tuple[DiscrepancySum, dict[str, Metric]]:
    recomputed, rollout = torch.as_tensor(recomputed), torch.as_tensor(rollout)
    mask = torch.ones_like(rollout, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    sequence_ids = torch.zeros(len(rollout), dtype=torch.int64)
    if ids is not None:
        sequence_ids = torch.as_tensor(ids)
    weight_versions = torch.full((len(rollout),), 7)
    if versions is not None:
        weight_versions = torch.as_tensor(versions)
    return discrepancy_metrics(
        recomputed,
        rollout,
        mask,
        weight_versions,
        7,
        sequence_ids=sequence_ids,
        num_sequences=int(sequence_ids.max()) + 1 if len(rollout) else 0,
    )


# Sequence 0: p_train 1/2, 1/8 and p_inf 1/4, 1/4, so rho 2, 1/2. Sequence 1: a masked token with
# nonsense, then p_train 3/4 and p_inf 1/4, rho 3. Sequence 2: nothing kept. Then padding.
HAND = {
    "recomputed": [-LN2, -3 * LN2, math.nan, LN3 - 2 * LN2, -1.0, 0.0],
    "rollout": [-2 * LN2, -2 * LN2, -math.inf, -2 * LN2, -2.0, 0.0],
    "mask": [True, True, False, True, False, False],
    "ids": [0, 0, 1, 1, 2, -1],
    "versions": [7, 6, -1, 3, -1, -1],
}
# (p_train, p_inf) by token.
PAIRS = [(1 / 2, 1 / 4), (1 / 8, 1 / 4), (3 / 4, 1 / 4)]


def bernoulli_jsd(p: float, q: float) -> float:
    middle = (p + q) / 2

    def divergence(a: float) -> float:
        return a * math.log(a / middle) + (1 - a) * math.log((1 - a) / (1 - middle))

    return (divergence(p) + divergence(q)) / 2


def population_deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


EXPECTED = {
    "mean": (1 / 4 + 1 / 8 + 1 / 2) / 3,
    "max": 1 / 2,
    "std": population_deviation([1 / 4, 1 / 8, 1 / 2]),
    "age_0/mean": 1 / 4,
    "age_1/mean": 1 / 8,
    "age_2_plus/mean": 1 / 2,
    "age/mean": (0 + 1 + 4) / 3,
    "age/max": 4.0,
    "position_0/mean": (1 / 4 + 1 / 2) / 2,
    "position_1_to_3/mean": 1 / 8,
    "rollout_probability_0.1_to_0.5/mean": (1 / 4 + 1 / 8 + 1 / 2) / 3,
    "probability_difference/mean": (1 / 4 - 1 / 8 + 1 / 2) / 3,
    "probability_difference/std": population_deviation([1 / 4, -1 / 8, 1 / 2]),
    "log_ratio/mean": (LN2 - LN2 + LN3) / 3,
    "kl_k1/mean": -LN3 / 3,
    "kl_k3/mean": ((2 - 1 - LN2) + (1 / 2 - 1 + LN2) + (3 - 1 - LN3)) / 3,
    "jsd/mean": sum(bernoulli_jsd(*pair) for pair in PAIRS) / 3,
    "mult_prob_error/mean": (2 + 2 + 3) / 3,
    "ratio/mean": 5.5 / 3,
    "ratio/std": population_deviation([2, 0.5, 3]),
    "ratio/min": 0.5,
    "ratio/max": 3.0,
    "chi_square/token": (4 + 0.25 + 9) / 3 - 1,
    "effective_sample_size/token": (5.5 / 3) ** 2 / ((4 + 0.25 + 9) / 3),
    # Products of rho by sequence: 1 and 3; geometric means: 1 and 3.
    "chi_square/sequence_sum": (1 + 9) / 2 - 1,
    "effective_sample_size/sequence_sum": 2**2 / 5,
    "effective_sample_size/sequence_mean": 2**2 / 5,
    **{
        f"sequence_{how}_ratio/{what}": value
        for how in ("sum", "mean")
        for what, value in (("mean", 2.0), ("std", 1.0), ("min", 1.0), ("max", 3.0))
    },
    # exp(-mean log p): sequence 0 has 4 by both, sequence 1 has 4/3 by the learner and 4 by the
    # engine.
    "recomputed_perplexity/mean": (4 + 4 / 3) / 2,
    "rollout_perplexity/mean": 4.0,
    "perplexity_ratio/mean": (1 + 1 / 3) / 2,
    "recomputed_log_perplexity/mean": (2 * LN2 + 2 * LN2 - LN3) / 2,
    "rollout_log_perplexity/mean": 2 * LN2,
    "log_perplexity_difference/mean": -LN3 / 2,
    "log_perplexity_difference/abs_mean": LN3 / 2,
    "log_perplexity_difference/min": -LN3,
    "log_perplexity_difference/max": 0.0,
}
RATIO_SHARES = {"ratio_below/mean", "ratio_above/mean", "ratio_outside/mean"}
QUANTILES = {
    f"{of}{quantile}"
    for of in ("", "age_0/", "age_1/", "age_2_plus/")
    for quantile in ("q50", "q90", "q99")
}
# All tokens of HAND have p_inf 1/4.
LOG_ODDS = {f"log_odds_0.1_to_0.5/q{quantile}" for quantile in (1, 25, 50, 75, 99)}
KINDS = ("", "sequence_sum_", "sequence_mean_")  # of ratios


def test_numbers_worked_by_hand() -> None:
    figures = figures_of(metrics_of(**HAND))
    for name, value in EXPECTED.items():
        assert figures[f"discrepancy/{name}"] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    # p_inf is the same for every token, so there is no correlation.
    others = {f"discrepancy/{name}" for name in RATIO_SHARES | QUANTILES | LOG_ODDS}
    assert set(figures) == {f"discrepancy/{name}" for name in EXPECTED} | others


def test_the_quantiles_of_an_age_are_those_of_its_tokens() -> None:
    """Each age has one token; the quantiles of all tokens are from the same counts."""
    width = 10**0.1  # of a bin, ten a decade
    metrics = metrics_of(**HAND)
    figures = figures_of(metrics)
    for age, delta in (("age_0", 1 / 4), ("age_1", 1 / 8), ("age_2_plus", 1 / 2)):
        for quantile in ("q50", "q99"):
            assert delta / width <= figures[f"discrepancy/{age}/{quantile}"] <= delta * width
    assert 1 / 4 / width <= figures["discrepancy/q50"] <= 1 / 4 * width
    counts = [metrics[f"discrepancy/{age}"].counts for age in ("age_0", "age_1", "age_2_plus")]
    assert torch.equal(sum(counts), metrics["discrepancy"].counts)


def test_the_sum_that_lambda_steps_on_is_that_of_the_metric_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    sums, parts = [], []
    for num_tokens in (700, 0, 3, 1201):
        logprobs = -5 * torch.rand(2, num_tokens, generator=generator)
        mask = torch.rand(num_tokens, generator=generator) < 0.7
        gap, metrics = sum_and_metrics_of(*logprobs, mask)
        assert gap.num_tokens == mask.sum()
        sums.append(gap)
        parts.append(metrics)
        if num_tokens:
            assert gap.mean == figures_of(metrics)["discrepancy/mean"]
    first, *others = sums
    for other in others:
        first = first + other
    assert first.mean == figures_of(*parts)["discrepancy/mean"]
    assert first.total.dtype == first.num_tokens.dtype == torch.float64


def test_the_sum_and_the_mean_of_a_sequence_are_told_apart() -> None:
    """Ratios 2, 2 in one sequence and 1/2 in the other."""
    figures = figures_of(metrics_of([-LN2, -LN2, -3 * LN2], [-2 * LN2] * 3, ids=[0, 0, 1]))
    assert figures["discrepancy/sequence_sum_ratio/max"] == pytest.approx(4.0)
    assert figures["discrepancy/sequence_mean_ratio/max"] == pytest.approx(2.0)
    assert figures["discrepancy/sequence_sum_ratio/mean"] == pytest.approx(2.25)
    assert figures["discrepancy/sequence_mean_ratio/mean"] == pytest.approx(1.25)
    assert figures["discrepancy/chi_square/sequence_sum"] == pytest.approx((16 + 0.25) / 2 - 1)
    assert figures["discrepancy/effective_sample_size/sequence_sum"] == pytest.approx(
        2.25**2 / ((16 + 0.25) / 2)
    )
    assert figures["discrepancy/effective_sample_size/sequence_mean"] == pytest.approx(
        1.25**2 / ((4 + 0.25) / 2)
    )
    assert figures["discrepancy/effective_sample_size/token"] == pytest.approx(1.5**2 / 2.75)


def test_shares_outside_the_bounds() -> None:
    log_ratios = torch.tensor([-0.7, -0.69, 0.0, 0.69, 0.7, 0.8, 3.0, 0.1])
    figures = figures_of(metrics_of(log_ratios - 4.0, torch.full((8,), -4.0)))
    assert figures["discrepancy/ratio_below/mean"] == 1 / 8
    assert figures["discrepancy/ratio_above/mean"] == 3 / 8
    assert figures["discrepancy/ratio_outside/mean"] == 4 / 8


def test_correlation_and_divergence_by_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    p_inf = torch.rand(500, generator=generator)
    p_train = (p_inf + 0.1 * torch.randn(500, generator=generator)).clamp(0.01, 0.99)
    figures = figures_of(metrics_of(p_train.log(), p_inf.log()))
    p_train, p_inf = p_train.log().double().exp(), p_inf.log().double().exp()
    expected = torch.corrcoef(torch.stack([p_train, p_inf]))[0, 1].item()
    assert figures["discrepancy/pearson"] == pytest.approx(expected, rel=1e-9)
    divergences = [bernoulli_jsd(p, q) for p, q in zip(p_train.tolist(), p_inf.tolist())]
    assert figures["discrepancy/jsd/mean"] == pytest.approx(sum(divergences) / 500, rel=1e-9)


def test_opposite_certainties_are_log_2_apart() -> None:
    figures = figures_of(metrics_of([0.0, -1000.0], [-1000.0, 0.0]))
    assert figures["discrepancy/jsd/mean"] == pytest.approx(LN2)
    assert figures["discrepancy/pearson"] == -1.0


def test_bins_of_position_and_of_probability() -> None:
    """A response of 20 tokens behind another of 2, each token with a gap of its own."""
    p_inf = torch.tensor([0.005, 0.05, *torch.linspace(0.3, 0.995, 20).tolist()])
    gap = torch.linspace(0.0001, 0.004, 22)
    # A gap in the mask: positions count sampled tokens.
    is_sampled = torch.tensor([True] * 5 + [False] * 2 + [True] * 15)
    ids = torch.tensor([0] * 2 + [1] * 20)
    figures = figures_of(metrics_of((p_inf - gap).log(), p_inf.log(), is_sampled, ids=ids))
    position = [0, 1, 0, 1, 2, None, None, *range(3, 18)]
    for name, low, high in (
        ("0", 0, 0),
        ("1_to_3", 1, 3),
        ("4_to_15", 4, 15),
        ("16_to_63", 16, 63),
    ):
        own = [g for g, p in zip(gap.tolist(), position) if p is not None and low <= p <= high]
        expected = sum(own) / len(own)
        got = figures[f"discrepancy/position_{name}/mean"]
        assert got == pytest.approx(expected, rel=1e-4), name
    assert "discrepancy/position_64_to_255/mean" not in figures
    edges = (0, 0.01, 0.1, 0.5, 0.9, 0.99, 1)
    for low, high in itertools.pairwise(edges):
        own = gap[(p_inf >= low) & (p_inf < high) & is_sampled]
        got = figures[f"discrepancy/rollout_probability_{low:g}_to_{high:g}/mean"]
        assert got == pytest.approx(own.mean().item(), rel=1e-4), low


def test_equal_engines_give_the_neutral_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(300, generator=generator)
    figures = figures_of(metrics_of(logprobs, logprobs, ids=torch.arange(300) // 30))
    neutral = {
        name: value
        for name, value in figures.items()
        if not name.endswith(("rollout_perplexity/mean", "recomputed_perplexity/mean"))
        and "_log_perplexity/" not in name
    }
    ones = {f"{kind}ratio/{what}" for kind in KINDS for what in ("mean", "min", "max")}
    ones |= {"pearson", "mult_prob_error/mean", "perplexity_ratio/mean"}
    for name, value in neutral.items():
        what = name.removeprefix("discrepancy/")
        is_one = what in ones or what.startswith("effective_sample_size")
        is_quantile, is_log_odds = what in QUANTILES, what.startswith("log_odds_")
        expected = 1.0 if is_one else 0.0
        tolerance = 1e-6 if is_log_odds else 1e-7 if is_quantile else 1e-12  # a bin's width
        assert value == pytest.approx(expected, abs=tolerance), name
    both = (figures[f"discrepancy/{name}_perplexity/mean"] for name in ("recomputed", "rollout"))
    assert len(set(both)) == 1


def test_log_ratios_are_clamped_before_exp() -> None:
    figures = figures_of(metrics_of([-500.0, -500.0], [-0.1, -0.1]))
    assert figures["discrepancy/mult_prob_error/mean"] == pytest.approx(math.exp(20))
    assert figures["discrepancy/kl_k1/mean"] == 20.0
    assert figures["discrepancy/log_ratio/mean"] == pytest.approx(-499.9, rel=1e-6)
    assert figures["discrepancy/sequence_sum_ratio/max"] == pytest.approx(math.exp(-20))
    assert figures["discrepancy/recomputed_perplexity/mean"] == pytest.approx(math.exp(20))
    assert figures["discrepancy/log_perplexity_difference/max"] == pytest.approx(499.9, rel=1e-6)
    assert all(math.isfinite(value) for value in figures.values())


def test_small_gaps_keep_their_digits() -> None:
    """Log-ratios of 1e-9 about certain tokens: a variance from sums of rho^2 would be rounding."""
    generator = torch.Generator().manual_seed(1)
    noise = 1e-9 * torch.randn(1000, generator=generator, dtype=torch.float64)
    rollout = -1e-6 * torch.rand(1000, generator=generator, dtype=torch.float64) - 1e-6
    figures = figures_of(metrics_of(rollout + noise, rollout))
    deviation = noise.std(correction=0).item()
    assert figures["discrepancy/ratio/std"] == pytest.approx(deviation, rel=1e-6)
    pair = torch.stack([(rollout + noise).expm1(), rollout.expm1()])
    correlation = torch.corrcoef(pair)[0, 1].item()
    assert 1 - figures["discrepancy/pearson"] == pytest.approx(1 - correlation, rel=1e-4)
    assert 0 < 1 - correlation < 1e-5


def test_a_divergence_of_near_certain_tokens_keeps_its_digits() -> None:
    """Of Bernoulli distributions with 1e-9 and 3e-9: m * g(1/2), m the middle."""
    rests = torch.tensor([1e-9, 3e-9], dtype=torch.float64)
    recomputed, rollout = (-rests).log1p()[:, None]
    expected = 2e-9 * (1.5 * math.log(1.5) + 0.5 * math.log(0.5)) / 2
    assert figures_of(metrics_of(recomputed, rollout))["discrepancy/jsd/mean"] == pytest.approx(
        expected, rel=1e-6
    )


def test_a_sequence_without_a_kept_token_is_no_extreme() -> None:
    figures = figures_of(metrics_of([-LN2, -1.0], [-2 * LN2, -1.0], [True, False], ids=[0, 1]))
    for name in ("sequence_sum_ratio", "sequence_mean_ratio"):
        assert figures[f"discrepancy/{name}/min"] == pytest.approx(2.0)
    assert figures["discrepancy/log_perplexity_difference/max"] == pytest.approx(-LN2)


def random_sequences(num: int) -> list[dict[str, torch.Tensor]]:
    """Of 0 to 40 tokens, some of which nobody sampled."""
    generator = torch.Generator().manual_seed(11)
    sequences = []
    for number in range(num):
        length = int(torch.randint(0, 41, (), generator=generator))
        rollout = -4 * torch.rand(length, generator=generator)
        noise = 0.3 * torch.randn(length, generator=generator)
        mask = torch.rand(length, generator=generator) < (0.7 if number % 5 else 0.0)
        versions = torch.randint(4, 8, (length,), generator=generator)
        sequences.append(
            {
                "recomputed": (rollout + noise).clamp(max=0.0),
                "rollout": rollout,
                "mask": mask,
                "versions": versions,
            }
        )
    return sequences


def row_of(sequences: list[dict[str, torch.Tensor]]) -> dict[str, Metric]:
    """The sequences packed into one row with padding behind."""
    row = {
        name: torch.cat([torch.zeros(0), *(each[name] for each in sequences), torch.zeros(3)])
        for name in ("recomputed", "rollout")
    }
    lengths = [len(each["mask"]) for each in sequences]
    ids = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * 3)
    mask = torch.cat([each["mask"] for each in sequences] + [torch.zeros(3, dtype=torch.bool)])
    versions = torch.cat([each["versions"] for each in sequences] + [torch.full((3,), -1)])
    _, metrics = discrepancy_metrics(
        row["recomputed"],
        row["rollout"],
        mask,
        versions,
        7,
        sequence_ids=ids,
        num_sequences=len(sequences),
    )
    return metrics


@pytest.mark.parametrize("num_rows", [2, 7, 60])
def test_rows_and_ranks_change_nothing(num_rows: int) -> None:
    """Rows of a rank are merged, ranks added: the same sums either way. Of 60 rows some are empty
    and most hold one sequence; the sequences stand in another order.
    """
    sequences = random_sequences(50)
    whole = figures_of(row_of(sequences))
    assert len(whole) > 50
    rows = [row_of(sequences[::-1][number::num_rows]) for number in range(num_rows)]
    split = figures_of(*rows)
    assert split.keys() == whole.keys()
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-9, abs=1e-15), name


def test_an_empty_mask_has_the_same_keys_and_no_values() -> None:
    empty = metrics_of(torch.zeros(3), torch.zeros(3), [False] * 3)
    nothing = metrics_of(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    full = metrics_of(torch.zeros(3), torch.zeros(3))
    assert set(empty) == set(nothing) == set(full)
    assert figures_of(empty) == figures_of(nothing) == {}
    assert figures_of(empty, full, nothing) == figures_of(full)


def test_the_mean_is_of_the_delta_that_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    recomputed = -5 * torch.rand(1000, generator=generator)
    rollout = -5 * torch.rand(1000, generator=generator)
    mask = torch.rand(1000, generator=generator) < 0.5
    expected = discrepancy(recomputed, rollout)[mask].double().mean().item()
    figures = figures_of(metrics_of(recomputed, rollout, mask))
    assert figures["discrepancy/mean"] == pytest.approx(expected, rel=1e-15)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="expected sequence_ids of the mask's shape"):
        metrics_of(torch.zeros(3), torch.zeros(3), ids=[0, 0])
