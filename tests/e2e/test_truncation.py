"""An engine that samples from the nucleus, and a learner that renormalises over the same tokens:
the mean of p_train / p_inf over the sampled tokens is 1. Over the whole vocabulary, on the same
rollouts, it is the share of the probability that the sampler left. (From the second step on that
other learner has other weights as well, since its first step was another one.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.e2e.runs import read_jsonl, train_to_the_end
from tests.support.served_engine import ServedEngine

SAMPLING = {"max_tokens": 100, "top_p": 0.9, "top_k": 20}
NUM_STEPS = 2  # the second one from weights that a step has changed
# Two mini-batches, so that log-probs are recomputed in a pass of their own.
LEARNER = {
    "tokens_per_micro_batch": 1024,
    "mini_batches_per_step": 2,
    "optimizer": {"learning_rate": 5e-3},
}
TOLERANCE = 0.005


def mean_ratio(line: dict[str, float]) -> float:
    """Mean of rho = p_train / p_inf, from the means of rho - 1 - log rho and of -log rho."""
    return 1 + line["discrepancy/kl_k3/mean"] - line["discrepancy/kl_k1/mean"]


def test_learner_and_truncating_engine_agree(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    loop = {"num_steps": NUM_STEPS, "prompts_per_step": 8, "samples_per_prompt": 8}
    config = write_config(
        tmp_path,
        parallel={"tensor": 2},
        learner=LEARNER,
        loop=loop,
        rollout={"sampling": SAMPLING},
    )
    sampled, replayed = tmp_path / "sampled", tmp_path / "replayed"
    train_to_the_end(config, num_ranks=2, run_dir=sampled, engine=served_engine)
    train_to_the_end(
        config,
        f"replay={sampled / 'rollouts'}",
        "rollout.sampling.top_p=1.0",
        "rollout.sampling.top_k=0",
        num_ranks=2,
        run_dir=replayed,
    )
    lines, without = (
        [each for each in read_jsonl(folder / "metrics.jsonl") if each["step"] > 0]
        for folder in (sampled, replayed)
    )
    for line, biased in zip(lines, without, strict=True):
        print(
            f"step {line['step']}: mean p_train / p_inf {mean_ratio(line):.6f}, without the "
            f"support {mean_ratio(biased):.4f}; largest |p_train - p_inf| "
            f"{line['discrepancy/max']:.1e} and {biased['discrepancy/max']:.2f}; outside the "
            f"support {line['discrepancy/outside_support/mean']:.5f}"
        )
        assert abs(mean_ratio(line) - 1) <= TOLERANCE
        assert line["discrepancy/outside_support/mean"] <= 0.002
        assert mean_ratio(biased) < 0.95
        assert biased["discrepancy/outside_support/mean"] == 0
    assert len(lines) == NUM_STEPS
