"""Writes the curves of a run to TensorBoard, on rank 0. The only module that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

# The bins of p_inf in which the log-odds displacement is measured (objective/log_odds.py).
CONFIDENCES = (
    "0_to_0.01",
    "0.01_to_0.1",
    "0.1_to_0.5",
    "0.5_to_0.9",
    "0.9_to_0.99",
    "0.99_to_0.999",
    "0.999_to_0.9999",
    "0.9999_to_1",
)
# The Custom Scalars page: category -> chart -> tags (regular expressions; of a Margin the value and
# the ends of its band) drawn in the chart. The first category summarises the state of the gap; the
# others help to find its causes.
LAYOUT = {
    "state of the gap": {
        "reward": ["Multiline", ["^reward/mean$", "^eval/reward/mean$"]],
        "discrepancy and tolerance": [
            "Multiline",
            ["^discrepancy/mean$", "^constraint/tolerance$"],
        ],
        "another constrained signal and its tolerance": [
            "Multiline",
            ["^constraint/signal/(mean|tolerance)$"],
        ],
        "lambda": ["Multiline", ["^constraint/lambda$"]],
        "lambda * delta as a share of |A|": ["Multiline", ["^constraint/penalty_share/mean$"]],
        "k1 and k3": ["Multiline", ["^discrepancy/kl_k[13]/mean$"]],
        "effective sample size": ["Multiline", ["^discrepancy/effective_sample_size/.*"]],
        "entropy": ["Multiline", ["^loss/entropy/mean$"]],
        "gradient norm": ["Multiline", ["^learner/grad_norm$"]],
        "age": ["Multiline", ["^discrepancy/age/.*"]],
    },
    "log-odds displacement by p_inf": {
        "median": ["Multiline", ["^discrepancy/log_odds_.*/q50$"]],
        "quartiles": ["Multiline", ["^discrepancy/log_odds_.*/q(25|75)$"]],
        **{
            f"{each.replace('_', ' ')}: median, q1 and q99": [
                "Margin",
                [f"discrepancy/log_odds_{each}/{quantile}" for quantile in ("q50", "q1", "q99")],
            ]
            for each in CONFIDENCES
        },
    },
    "discrepancy": {
        "quantiles and max": ["Multiline", ["^discrepancy/q[0-9.]+$", "^discrepancy/max$"]],
        "by position": ["Multiline", ["^discrepancy/position_.*"]],
        "by rollout probability": ["Multiline", ["^discrepancy/rollout_probability_.*"]],
        "by age": ["Multiline", ["^discrepancy/age_.*/mean$"]],
        "by age, median": ["Multiline", ["^discrepancy/age_.*/q50$"]],
        "by age, q99": ["Multiline", ["^discrepancy/age_.*/q99$"]],
        "p_train - p_inf": ["Multiline", ["^discrepancy/probability_difference/.*"]],
        "Pearson of p_train and p_inf": ["Multiline", ["^discrepancy/pearson$"]],
        "mult-prob-error": ["Multiline", ["^discrepancy/mult_prob_error/mean$"]],
        "JSD": ["Multiline", ["^discrepancy/jsd/mean$"]],
    },
    "ratios p_train / p_inf": {
        "of tokens": ["Multiline", ["^discrepancy/ratio/.*"]],
        "share outside 0.5 to 2": ["Multiline", ["^discrepancy/ratio_.*"]],
        "of sequences, product": ["Multiline", ["^discrepancy/sequence_sum_ratio/.*"]],
        "of sequences, geometric mean": ["Multiline", ["^discrepancy/sequence_mean_ratio/.*"]],
        "chi-square": ["Multiline", ["^discrepancy/chi_square/.*"]],
        "perplexity": ["Multiline", ["^discrepancy/(recomputed|rollout)_perplexity/mean$"]],
        "log-perplexity difference": [
            "Multiline",
            ["^discrepancy/log_perplexity_difference/.*"],
        ],
        "correction's weights": ["Multiline", ["^correction/weight/.*"]],
        "corrected, rejected and vetoed": [
            "Multiline",
            ["^correction/.*_(bounds|tokens|sequences)/mean$"],
        ],
    },
    "reward": {
        "evaluation": ["Multiline", ["^eval/(avg|pass)_at_[0-9]+$"]],
        "evaluation sets, avg@k": [
            "Multiline",
            ["^eval/[^/]+/avg_at_[0-9]+$", "^eval/mean_of_sets$"],
        ],
        "evaluation sets, pass@k": ["Multiline", ["^eval/[^/]+/pass_at_[0-9]+$"]],
        "evaluation sets, responses cut": ["Multiline", ["^eval/[^/]+/truncation_rate/mean$"]],
        "rates": ["Multiline", ["^reward/[^/]+_rate/mean$", "^rollout/truncation_rate/mean$"]],
        "groups with signal, samples kept": [
            "Multiline",
            ["^reward/groups_with_signal/mean$", "^rollout/kept_rate/mean$"],
        ],
        "over-long penalty": ["Multiline", ["^reward/overlong_penalty/mean$"]],
        "response tokens": ["Multiline", ["^rollout/response_tokens/.*"]],
    },
    "learner": {
        "loss": ["Multiline", ["^loss/mean$"]],
        "clip fraction": ["Multiline", ["^loss/clip_fraction.*"]],
        "KL of the update, to the engine under bypass, to the reference": [
            "Multiline",
            ["^loss/(update|rollout)_kl/mean$", "^reference/kl_.*/mean$"],
        ],
        "learning rate": ["Multiline", ["^learner/learning_rate$"]],
        "updates skipped, and taken back": [
            "Multiline",
            ["^learner/num_(skipped|broken)_updates$", "^acceptance/is_taken_back$"],
        ],
        "J of learner minus engine": ["Multiline", ["^acceptance/loss$"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["^speed/tokens_per_second$"]],
        "tokens per second and GPU": ["Multiline", ["^speed/tokens_per_second_per_gpu$"]],
        "MFU": ["Multiline", ["^speed/mfu$"]],
        "seconds by phase": ["Multiline", ["^speed/seconds/.*"]],
        "seconds of the slowest rank": ["Multiline", ["^speed/slowest_seconds/.*"]],
        "which rank is the slowest": ["Multiline", ["^speed/slowest_rank/.*"]],
        "weight sync, GiB per second": ["Multiline", ["^speed/sync_gib_per_second$"]],
        "memory, GiB": ["Multiline", ["^speed/memory/.*"]],
    },
    "engines": {
        "running requests": ["Multiline", ["^speed/engines/[0-9]+/running/mean$"]],
        "waiting requests": ["Multiline", ["^speed/engines/[0-9]+/waiting/.*"]],
        "use of the KV cache": ["Multiline", ["^speed/engines/[0-9]+/kv_cache_use/max$"]],
        "preemptions": ["Multiline", ["^speed/engines/[0-9]+/preemptions/sum$"]],
    },
}


class TensorBoardWriter:
    """Writes scalars to the `tensorboard/` folder of a run; one process has one.

    Args:
        folder: created if it does not exist.
        purge_step: when resuming, the first step that is repeated: TensorBoard then hides what the
            earlier process wrote for it and for later steps. None in a new run.
    """

    def __init__(self, folder: str | Path, *, purge_step: int | None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._writer.add_custom_scalars(LAYOUT)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of a step and flush them, so that a killed run loses none."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
