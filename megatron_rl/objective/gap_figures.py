"""Computes the metrics of the gap from the sums and maxima of gap_metrics.py, after these have been
reduced over all ranks.

discrepancy/mean, max, std                       of delta = |p_train - p_inf|; q50, q90, q99
discrepancy/age_0/mean, ...                      delta by age of the sampling weights; its q50 ...
discrepancy/position_1_to_3/mean, ...            by the token's number in its response, from 0
discrepancy/rollout_probability_0.1_to_0.5/mean  by p_inf
discrepancy/age/mean, max                        in training steps
discrepancy/probability_difference/mean, std     p_train - p_inf, signed
discrepancy/pearson                              of p_train and p_inf over tokens
discrepancy/kl_k1/mean, kl_k3/mean, jsd/mean     nats; log_ratio/mean: log rho, unclamped
discrepancy/mult_prob_error/mean                 exp|log rho|, 1 where the engines agree
discrepancy/chi_square/token, sequence_sum
discrepancy/effective_sample_size/token, sequence_sum, sequence_mean
discrepancy/ratio/mean, std, min, max            rho; also sequence_sum_ratio, _mean_ratio
discrepancy/ratio_outside/mean                   share of tokens with rho outside [0.5, 2];
                                                 ratio_below/mean and ratio_above/mean are parts
discrepancy/recomputed_perplexity/mean, rollout_perplexity/mean, perplexity_ratio/mean
discrepancy/recomputed_log_perplexity/mean, rollout_log_perplexity/mean
discrepancy/log_perplexity_difference/mean, abs_mean, min, max   recomputed less rollout
"""

from __future__ import annotations

import math

RATIO_LOW, RATIO_HIGH = 0.5, 2.0
AGES = ("age_0", "age_1", "age_2_plus")
POSITION_EDGES = (1, 4, 16, 64, 256, 1024, 4096)
PROBABILITY_EDGES = (0.01, 0.1, 0.5, 0.9, 0.99)


def bin_names(
    what: str, edges: tuple[float, ...], last: str, *, are_integers: bool
) -> tuple[str, ...]:
    """Names of the bins between edges, such as "position_1_to_3"; the last one is open above."""
    lows = (0, *edges)
    highs = [f"{edge - 1}" if are_integers else f"{edge:g}" for edge in edges]
    bounded = [
        f"{what}_{low}" if f"{low}" == high else f"{what}_{low}_to_{high}"
        for low, high in zip(lows, highs)
    ]
    return (*bounded, f"{what}_{last}")


POSITIONS = bin_names("position", POSITION_EDGES, f"{POSITION_EDGES[-1]}_plus", are_integers=True)
PROBABILITIES = bin_names(
    "rollout_probability", PROBABILITY_EDGES, f"{PROBABILITY_EDGES[-1]:g}_to_1", are_integers=False
)

# A variance below this fraction of the mean square is a rounding error, and no correlation is
# reported.
_NO_VARIANCE = 1e-13


def finish(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """The metrics listed in the docstring of this module. Without a token there are none; the mean
    of an empty bin is left out.
    """
    num_tokens, num_sequences = sums["tokens"], sums["sequences"]
    if not num_tokens:
        return {}
    of_token = {name: value / num_tokens for name, value in sums.items()}
    of_sequence = {name: value / num_sequences for name, value in sums.items()}
    figures = {
        "mean": of_token["delta"],
        "max": maxima["delta"],
        "std": _deviation(of_token["delta"], of_token["difference^2"]),
        "age/mean": of_token["age"],
        "age/max": maxima["age"],
        "probability_difference/mean": of_token["difference"],
        "probability_difference/std": _deviation(of_token["difference"], of_token["difference^2"]),
        "chi_square/token": _chi_square(of_token, "excess"),
        "chi_square/sequence_sum": _chi_square(of_sequence, "sequence_sum_excess"),
        "ratio_outside/mean": of_token["ratio_below"] + of_token["ratio_above"],
        "log_perplexity_difference/mean": of_sequence["log_perplexity_difference"],
        "log_perplexity_difference/abs_mean": of_sequence["log_perplexity_distance"],
        "log_perplexity_difference/min": -maxima["-log_perplexity_difference"],
        "log_perplexity_difference/max": maxima["log_perplexity_difference"],
    }
    for name in (
        "log_ratio",
        "kl_k1",
        "kl_k3",
        "jsd",
        "mult_prob_error",
        "ratio_below",
        "ratio_above",
    ):
        figures[f"{name}/mean"] = of_token[name]
    for name in ("perplexity", "log_perplexity"):
        figures[f"recomputed_{name}/mean"] = of_sequence[f"recomputed_{name}"]
        figures[f"rollout_{name}/mean"] = of_sequence[f"rollout_{name}"]
    figures["perplexity_ratio/mean"] = of_sequence["perplexity_ratio"]
    for level, means, prefix in (
        ("token", of_token, ""),
        ("sequence_sum", of_sequence, "sequence_sum_"),
        ("sequence_mean", of_sequence, "sequence_mean_"),
    ):
        ratio, excess = f"{prefix}ratio", f"{prefix}excess"
        figures |= {
            f"{ratio}/mean": means[ratio],
            f"{ratio}/std": _deviation(means[excess], means[f"{excess}^2"]),
            f"{ratio}/min": -maxima[f"-{ratio}"],
            f"{ratio}/max": maxima[ratio],
            f"effective_sample_size/{level}": means[ratio] ** 2 / means[f"{ratio}^2"],
        }
    for name in (*AGES, *POSITIONS, *PROBABILITIES):
        if sums[f"tokens/{name}"]:
            figures[f"{name}/mean"] = sums[f"delta/{name}"] / sums[f"tokens/{name}"]
    correlation = _correlation(of_token)
    if correlation is not None:
        figures["pearson"] = correlation
    return {f"discrepancy/{name}": value for name, value in figures.items()}


def _deviation(mean: float, mean_square: float) -> float:
    """The population standard deviation."""
    return math.sqrt(max(0.0, mean_square - mean * mean))


def _chi_square(means: dict[str, float], excess: str) -> float:
    """The mean of rho^2 - 1, computed from the sums of rho - 1."""
    return 2 * means[excess] + means[f"{excess}^2"]


def _correlation(means: dict[str, float]) -> float | None:
    """Pearson's correlation of p_train and p_inf, computed as that of 1 - p_train and 1 - p_inf,
    which is equal. None if one of them does not vary.
    """
    rest, difference = means["rollout_rest"], means["difference"]
    variance = means["rollout_rest^2"] - rest * rest
    covariance = means["rollout_rest*difference"] - rest * difference
    # 1 - p_train = (1 - p_inf) - difference
    recomputed_variance = (
        variance - 2 * covariance + means["difference^2"] - difference * difference
    )
    threshold = _NO_VARIANCE * means["rollout_rest^2"]
    if variance <= threshold or recomputed_variance <= threshold:
        return None
    correlation = (variance - covariance) / math.sqrt(variance * recomputed_variance)
    return min(1.0, max(-1.0, correlation))
