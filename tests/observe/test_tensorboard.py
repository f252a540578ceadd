import re
import time
from types import SimpleNamespace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import event_file_writer

from megatron_rl.loop.evaluation_metrics import evaluation_metrics
from megatron_rl.loop.report import NOTHING_SAMPLED, rollout_metrics
from megatron_rl.objective import log_odds
from megatron_rl.objective.gap_metrics import discrepancy_metrics
from megatron_rl.observe import tensorboard
from megatron_rl.observe.metrics import reduce
from megatron_rl.observe.tensorboard import LAYOUT, TensorBoardWriter


def later_clock():
    """A second later: files of one second are ordered by their number, as text."""
    return SimpleNamespace(time=lambda: time.time() + 1, sleep=time.sleep)


def test_scalars_survive_a_resume_without_doubled_steps(tmp_path, monkeypatch):
    first = TensorBoardWriter(tmp_path, purge_step=None)
    for step in range(4):
        first.write(step, {"reward/mean": step / 10})
    # Not closed: a killed process closes nothing, and every step was flushed.
    monkeypatch.setattr(event_file_writer, "time", later_clock())
    resumed = TensorBoardWriter(tmp_path, purge_step=2)
    resumed.write(2, {"reward/mean": 9.0})
    resumed.close()
    first.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("reward/mean")] == [
        (0, 0.0),
        (1, 0.1),
        (2, 9.0),
    ]


def keys_of_a_step() -> set[str]:
    """What objective and learner report of tokens of every confidence, and the others' keys by
    name.
    """
    rollout = torch.tensor([0.005, 0.05, 0.3, 0.7, 0.95, 0.995, 0.9995, 0.99995]).log()
    zeros = torch.zeros(len(rollout), dtype=torch.int64)
    _, of_gap = discrepancy_metrics(
        rollout * 0.9, rollout, zeros == 0, zeros, 0, sequence_ids=zeros, num_sequences=1
    )
    keys = set(reduce(of_gap, lambda values, operation: values))
    keys |= set(rollout_metrics(NOTHING_SAMPLED, {"a": ()}))
    keys |= {key for name in ("", "aime24") for key in evaluation_metrics([], 8, name=name)}
    return keys | {
        "eval/mean_of_sets",
        "acceptance/is_taken_back",
        "acceptance/loss",
        "constraint/is_ineffective",
        "constraint/lambda",
        "constraint/num_steps_at_maximum",
        "constraint/num_steps_growing",
        "constraint/penalty_share/mean",
        "constraint/signal/mean",
        "constraint/signal/tolerance",
        "constraint/tolerance",
        "correction/outside_bounds/mean",
        "correction/rejected_tokens/mean",
        "correction/weight/max",
        "learner/grad_norm",
        "learner/learning_rate",
        "learner/num_skipped_updates",
        "loss/clip_fraction_low/mean",
        "loss/entropy/mean",
        "loss/mean",
        "loss/rollout_kl/mean",
        "loss/update_kl/mean",
        "reference/kl_k3/mean",
        "speed/engines/0/kv_cache_use/max",
        "speed/engines/0/preemptions/sum",
        "speed/engines/0/running/mean",
        "speed/engines/0/waiting/max",
        "speed/memory/host_gib/max",
        "speed/mfu",
        "speed/seconds/rollout",
        "speed/slowest_rank/learner",
        "speed/slowest_seconds/learner",
        "speed/sync_gib_per_second",
        "speed/tokens_per_second",
        "speed/tokens_per_second_per_gpu",
    }


def test_the_first_group_tells_the_state_of_the_gap():
    first = next(iter(LAYOUT.values()))
    shown = {key for key in keys_of_a_step() if any_chart_shows(first, key)}
    assert shown >= {
        "reward/mean",
        "discrepancy/mean",
        "constraint/tolerance",
        "constraint/lambda",
        "discrepancy/kl_k1/mean",
        "discrepancy/kl_k3/mean",
        "discrepancy/effective_sample_size/token",
        "discrepancy/effective_sample_size/sequence_sum",
        "loss/entropy/mean",
        "learner/grad_norm",
        "discrepancy/age/mean",
    }


def any_chart_shows(charts: dict, key: str) -> bool:
    return any(re.search(tag, key) for _, tags in charts.values() for tag in tags)


def test_every_chart_has_a_curve():
    keys = keys_of_a_step()
    for charts in LAYOUT.values():
        for title, (_, tags) in charts.items():
            assert all(any(re.search(tag, key) for key in keys) for tag in tags), title


def test_every_bin_of_the_log_odds_has_its_chart():
    assert [f"log_odds_{each}" for each in tensorboard.CONFIDENCES] == list(log_odds.CONFIDENCES)
    charts = LAYOUT["log-odds displacement by p_inf"]
    bands = [tags for kind, tags in charts.values() if kind == "Margin"]
    keys = keys_of_a_step()
    assert [set(band) <= keys for band in bands] == [True] * len(log_odds.CONFIDENCES)


def test_the_layout_is_written(tmp_path):
    TensorBoardWriter(tmp_path, purge_step=None).close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [written] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    titles = [chart.title for chart in layout.category[0].chart]
    assert titles == list(LAYOUT["state of the gap"])
