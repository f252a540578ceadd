"""Computes the sums for the metrics of the gap from the log-probs of a row's response tokens. One
of them is the sum that drives the dual step of lambda.

With `p_train = exp(recomputed_logprobs)`, `p_inf = exp(rollout_logprobs)` and the raw ratio
`rho = p_train / p_inf`, before any truncation or masking:

    k1 = -log rho,  k3 = rho - 1 - log rho                estimates of KL(p_inf || p_train), nats
    chi square = mean rho^2 - 1
    effective sample size = 1 / mean((rho / mean rho)^2)  a share of the samples, 1 where rho is 1
    perplexity = exp(-mean log-prob of the sequence)      then the mean over sequences
    JSD = (KL(p_train || m) + KL(p_inf || m)) / 2         of the two Bernoulli distributions "this
                                                          token or another", m their mean, nats

The ratio of a sequence is named after the operation on its log-ratios: "sequence sum" is the
product of its tokens' rho, "sequence mean" their geometric mean. Log-ratios are clamped to +-20
before exp. The definitions are those of verl's rollout correction metrics. Standard deviations are
population standard deviations.

All results are sums or maxima in float64; gap_figures.py computes the metrics from them after they
have been reduced over all ranks. In addition to rho, rho - 1 is summed, so that small deviations
from 1 keep their digits.
"""

from __future__ import annotations

import math

import torch

from megatron_rl.objective.discrepancy import DiscrepancySum
from megatron_rl.objective.gap_figures import (
    AGES,
    POSITION_EDGES,
    POSITIONS,
    PROBABILITIES,
    PROBABILITY_EDGES,
    RATIO_HIGH,
    RATIO_LOW,
    finish,
)
from megatron_rl.objective.log_odds import bins_of, log_odds_metrics
from megatron_rl.objective.log_ratio import MAX_LOG_RATIO
from megatron_rl.objective.sequences import sums_by_index
from megatron_rl.observe.metrics import Figures, Histogram, Metric

HISTOGRAM_EDGES = (0.0, *(10.0 ** (tenth / 10) for tenth in range(-70, 1)))  # 0, 1e-7 to 1
RATIO_LOW_LOG, RATIO_HIGH_LOG = math.log(RATIO_LOW), math.log(RATIO_HIGH)

Terms = dict[str, torch.Tensor]


def discrepancy_metrics(
    recomputed_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    weight_versions: torch.Tensor,
    current_version: int,
    *,
    sequence_ids: torch.Tensor,
    num_sequences: int,
) -> tuple[DiscrepancySum, dict[str, Metric]]:
    """The sums of this micro-batch, to be added over micro-batches and ranks. The host synchronises
    with the device once, to learn the number of kept tokens.

    Args:
        recomputed_logprobs, rollout_logprobs: [T] float32.
        mask: [T] bool, every response token that was sampled.
        weight_versions: [T] int64, version of the weights that sampled the token.
        current_version: version of the weights that recomputed the log-probs; age =
            current_version - weight_versions.
        sequence_ids: [T] int64, ascending from 0, -1 on padding; each sequence is whole in the row.
        num_sequences: S, greater than every id.

    Returns:
        The sum of delta and the number of tokens, from which `discrepancy/mean` is computed too;
        and the metrics, that is, the figures listed in gap_figures.py, the quantiles of delta, and
        those of log_odds.py.
        The keys are the same for every input, including an empty mask.
    """
    for name, tensor in (
        ("recomputed_logprobs", recomputed_logprobs),
        ("rollout_logprobs", rollout_logprobs),
        ("weight_versions", weight_versions),
        ("sequence_ids", sequence_ids),
    ):
        if tensor.shape != mask.shape:
            raise ValueError(
                f"discrepancy_metrics: expected {name} of the mask's shape {tuple(mask.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    kept = mask.nonzero()[:, 0]
    recomputed = recomputed_logprobs.detach()[kept].double()
    rollout = rollout_logprobs.detach()[kept].double()
    age, sequence = current_version - weight_versions[kept], sequence_ids[kept]

    of_tokens = _token_terms(recomputed, rollout, age)
    sequence_sums = _sequence_sums(recomputed, rollout, sequence, num_sequences)
    of_sequences = _sequence_terms(sequence_sums)
    bins = {
        AGES: age.clamp(0, len(AGES) - 1),
        POSITIONS: bins_of(_positions(sequence, sequence_sums["tokens"]), POSITION_EDGES),
        PROBABILITIES: bins_of(rollout.exp(), PROBABILITY_EDGES),
    }
    delta = of_tokens[0]["delta"]
    grouped_names, grouped_sums = _grouped(delta, bins)
    sums_of_tokens = _sums(of_tokens[0])
    total, num_tokens = (
        sums_of_tokens[tuple(of_tokens[0]).index(name)] for name in ("delta", "tokens")
    )
    return DiscrepancySum(total=total, num_tokens=num_tokens), {
        **_histograms(delta, bins[AGES]),
        **log_odds_metrics(recomputed, rollout),
        "discrepancy/gap": Figures(
            sum_names=(*of_tokens[0], *of_sequences[0], *grouped_names),
            sums=torch.cat([sums_of_tokens, _sums(of_sequences[0]), grouped_sums]),
            max_names=(*of_tokens[1], *of_sequences[1]),
            maxima=torch.cat([_maxima(of_tokens[1]), _maxima(of_sequences[1])]),
            finish=finish,
        ),
    }


def _histograms(delta: torch.Tensor, age_bin: torch.Tensor) -> dict[str, Histogram]:
    """Of all tokens, and of those of each age."""
    of_ages = Histogram.of_groups(delta, age_bin, num_groups=len(AGES), edges=HISTOGRAM_EDGES)
    counts = torch.stack([each.counts for each in of_ages]).sum(0)
    return {"discrepancy": Histogram(edges=HISTOGRAM_EDGES, counts=counts)} | {
        f"discrepancy/{age}": own for age, own in zip(AGES, of_ages, strict=True)
    }


def _token_terms(
    recomputed: torch.Tensor, rollout: torch.Tensor, age: torch.Tensor
) -> tuple[Terms, Terms]:
    """The terms that are summed over tokens, and the terms that are maximised: [N] float64 each."""
    difference = recomputed.exp() - rollout.exp()
    # Rounded to float32 like the delta that shapes the advantages, so that the mean is taken over
    # the same numbers.
    delta = difference.abs().float().double()
    log_ratio = recomputed - rollout
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio, excess = clamped.exp(), clamped.expm1()  # rho and rho - 1
    # 1 - p is computed directly, because p itself would lose these digits near p = 1.
    rollout_rest, recomputed_rest = -rollout.expm1(), -recomputed.expm1()
    age = age.double()
    sums = {
        "tokens": torch.ones_like(delta),
        "delta": delta,
        "difference": difference,
        "difference^2": difference.square(),
        "rollout_rest": rollout_rest,
        "rollout_rest^2": rollout_rest.square(),
        "rollout_rest*difference": rollout_rest * difference,
        "log_ratio": log_ratio,
        "kl_k1": -clamped,
        "kl_k3": excess - clamped,
        "mult_prob_error": clamped.abs().exp(),
        "jsd": _bernoulli_jsd(recomputed_rest, rollout_rest),
        "ratio": ratio,
        "ratio^2": ratio.square(),
        "excess": excess,
        "excess^2": excess.square(),
        "ratio_below": (clamped < RATIO_LOW_LOG).double(),
        "ratio_above": (clamped > RATIO_HIGH_LOG).double(),
        "age": age,
    }
    return sums, {"delta": delta, "ratio": ratio, "-ratio": -ratio, "age": age}


def _bernoulli_jsd(one_rest: torch.Tensor, other_rest: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of two Bernoulli distributions, in nats, from 1 - p of each.

    With mean m and half difference d it is `m * g(d / m) + (1 - m) * g(d / (1 - m))`, where
    `g(x) = ((1 + x) log(1 + x) + (1 - x) log(1 - x)) / 2`. This form does not subtract numbers that
    are nearly equal.
    """
    middle, half = (one_rest + other_rest) / 2, (one_rest - other_rest).abs() / 2

    def part(mass: torch.Tensor) -> torch.Tensor:
        x = torch.where(mass > 0, half / mass, 0.0).clamp(max=1.0)
        return mass * (torch.special.xlog1py(1 + x, x) + torch.special.xlog1py(1 - x, -x)) / 2

    return part(middle) + part(1 - middle)


def _sequence_sums(
    recomputed: torch.Tensor, rollout: torch.Tensor, sequence: torch.Tensor, num_sequences: int
) -> Terms:
    """Sums over the tokens of each sequence, [S] float64 each."""
    per_token = torch.stack([torch.ones_like(rollout), recomputed, rollout, recomputed - rollout])
    sums = sums_by_index(per_token, sequence, num_sequences)
    return dict(zip(("tokens", "recomputed", "rollout", "log_ratio"), sums, strict=True))


def _sequence_terms(sums: Terms) -> tuple[Terms, Terms]:
    """The terms that are summed over sequences, and the terms that are maximised: [S] float64 each.
    A sequence without a kept token does not count.
    """
    is_kept = sums["tokens"] > 0
    num_tokens = sums["tokens"].clamp(min=1)

    def clamped(values: torch.Tensor) -> torch.Tensor:
        return values.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    log_perplexity = {name: -sums[name] / num_tokens for name in ("recomputed", "rollout")}
    difference = -sums["log_ratio"] / num_tokens
    log_ratios = {
        "sequence_sum": clamped(sums["log_ratio"]),
        "sequence_mean": clamped(-difference),
    }
    terms = {
        "recomputed_perplexity": clamped(log_perplexity["recomputed"]).exp(),
        "rollout_perplexity": clamped(log_perplexity["rollout"]).exp(),
        "perplexity_ratio": clamped(difference).exp(),
        "recomputed_log_perplexity": log_perplexity["recomputed"],
        "rollout_log_perplexity": log_perplexity["rollout"],
        "log_perplexity_difference": difference,
        "log_perplexity_distance": difference.abs(),
        "sequences": torch.ones_like(difference),
    }
    maxima = {
        "log_perplexity_difference": difference,
        "-log_perplexity_difference": -difference,
    }
    for level, log_ratio in log_ratios.items():
        ratio, excess = log_ratio.exp(), log_ratio.expm1()
        terms |= {f"{level}_ratio": ratio, f"{level}_ratio^2": ratio.square()}
        terms |= {f"{level}_excess": excess, f"{level}_excess^2": excess.square()}
        maxima |= {f"{level}_ratio": ratio, f"-{level}_ratio": -ratio}
    return (
        {name: torch.where(is_kept, values, 0.0) for name, values in terms.items()},
        {name: torch.where(is_kept, values, -torch.inf) for name, values in maxima.items()},
    )


def _positions(sequence: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """[N] the index of each kept token among the kept tokens of its sequence, from 0."""
    before = num_tokens.long().cumsum(0) - num_tokens.long()  # in the preceding sequences
    return torch.arange(len(sequence), device=sequence.device) - before[sequence]


def _grouped(
    delta: torch.Tensor, bins: dict[tuple[str, ...], torch.Tensor]
) -> tuple[tuple[str, ...], torch.Tensor]:
    """The sum of delta and the number of tokens in each bin of each grouping, in one operation."""
    names: list[str] = []
    index = []
    for own_names, own_bin in bins.items():
        index.append(own_bin + len(names))
        names += own_names
    values = torch.stack([delta, torch.ones_like(delta)]).repeat(1, len(bins))
    sums = sums_by_index(values, torch.cat(index), len(names))
    return (*(f"delta/{name}" for name in names), *(f"tokens/{name}" for name in names)), (
        sums.reshape(-1)
    )


def _sums(terms: Terms) -> torch.Tensor:
    return torch.stack(tuple(terms.values())).sum(1)


def _maxima(terms: Terms) -> torch.Tensor:
    stacked = torch.stack(tuple(terms.values()))
    # Padded by one element, because torch raises an error for the maximum of an empty tensor.
    return torch.nn.functional.pad(stacked, (0, 1), value=-torch.inf).amax(1)
