"""Reductions over real gloo ranks: any split of the values gives what one rank gives."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_rl.observe.metrics import Figures, Histogram, Max, Mean, Min, Sum, merge, reduce

EDGES = tuple(i / 1000 for i in range(1001))


def alone(tensor: torch.Tensor, op: str) -> torch.Tensor:
    return tensor


def all_reduce(tensor: torch.Tensor, op: str) -> torch.Tensor:
    dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor


def mean_and_max(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    if not sums["count"]:
        return {}
    return {"x/mean": sums["x"] / sums["count"], "x/max": maxima["x"]}


def histogram_of(values: torch.Tensor, *, edges: tuple[float, ...] = EDGES) -> Histogram:
    groups = torch.zeros(len(values), dtype=torch.int64)
    [histogram] = Histogram.of_groups(values, groups, num_groups=1, edges=edges)
    return histogram


def figures_of(values: torch.Tensor) -> Figures:
    largest = values.max().double() if len(values) else torch.tensor(-math.inf).double()
    return Figures(
        sum_names=("count", "x"),
        sums=torch.stack([torch.tensor(len(values)).double(), values.double().sum()]),
        max_names=("x",),
        maxima=largest[None],
        finish=mean_and_max,
    )


def parts_of(values: torch.Tensor) -> dict:
    """What a rank holding `values` [n] float32 reports; n may be 0."""
    has_values = len(values) > 0
    return {
        "a/mean": Mean(sum=values.double().sum(), count=len(values)),
        "a/sum": Sum(values.double().sum()),
        "a/max": Max(values.max() if has_values else float("-inf")),
        "a/min": Min(values.min() if has_values else float("inf")),
        "a/histogram": histogram_of(values),
        "a/figures": figures_of(values),
        "nobody/mean": Mean(sum=0.0, count=0),
        "nobody/max": Max(float("-inf")),
        "nobody/min": Min(float("inf")),
        "nobody/histogram": histogram_of(torch.zeros(0)),
    }


def values_of(split: str) -> list[torch.Tensor]:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(5)) ** 2
    sizes = {"even": [334, 333, 333], "one rank empty": [999, 0, 1]}[split]
    return list(values.split(sizes))


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    results = {
        s: reduce(parts_of(values_of(s)[rank]), all_reduce) for s in ("even", "one rank empty")
    }
    try:
        reduce({"a/sum": Sum(1.0)} if rank else {"b/sum": Sum(1.0)}, all_reduce)
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(3)
    ]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("split", ["even", "one rank empty"])
def test_ranks_together_equal_one_rank(of_ranks, split):
    whole = reduce(parts_of(torch.cat(values_of(split))), alone)
    assert of_ranks[0][split] == of_ranks[1][split] == of_ranks[2][split]
    assert of_ranks[0][split] == pytest.approx(whole, rel=1e-15)
    values = torch.cat(values_of(split)).double()
    assert whole["a/min"] == values.min().item()
    assert whole["x/max"] == values.max().item()
    assert whole["x/mean"] == pytest.approx(values.mean().item(), rel=1e-14)


def test_metrics_that_differ_between_ranks_are_refused_on_every_rank(of_ranks):
    assert all("expected the same metrics on every rank" in ranks["error"] for ranks in of_ranks)


def test_numbers_worked_by_hand():
    metrics = {
        "b/mean": Mean(sum=3.0, count=4),
        "c/max": Max(torch.tensor(-1.5)),
        "c/min": Min(0.25),
        "d/histogram": histogram_of(torch.tensor([-3.0, 1.5, 1.5, 9.0]), edges=(0.0, 1.0, 2.0)),
    }
    assert reduce(metrics, alone) == {
        "b/mean": 0.75,
        "c/max": -1.5,
        "c/min": 0.25,
        # Of four, one in [0, 1) and three in [1, 2): what lies outside is in the outer bins.
        "d/q50": pytest.approx(1 + 1 / 3),
        "d/q90": pytest.approx(1 + 2.6 / 3),
        "d/q99": pytest.approx(1 + 2.96 / 3),
    }


def test_groups_have_histograms_of_their_own():
    values, groups = torch.tensor([0.5, 1.5, 0.1, 0.2]), torch.tensor([0, 0, 2, 2])
    found = Histogram.of_groups(values, groups, num_groups=3, edges=(0.0, 1.0, 2.0))
    assert [each.counts.tolist() for each in found] == [[1, 1], [0, 0], [2, 0]]


def test_what_nobody_has_is_left_out():
    reduced = reduce(parts_of(torch.zeros(0)), alone)
    assert reduced == {"a/sum": 0.0}


def test_quantiles_are_right_up_to_the_width_of_a_bin():
    values = torch.cat(values_of("even"))
    counts = histogram_of(values).counts
    histogram = Histogram(edges=EDGES, counts=counts, quantiles=(0.25, 0.5, 0.999))
    reduced = reduce({"a/histogram": histogram}, alone)
    for name, quantile in (("a/q25", 0.25), ("a/q50", 0.5), ("a/q99.9", 0.999)):
        assert reduced[name] == pytest.approx(values.quantile(quantile).item(), abs=2e-3)


def test_micro_batches_of_a_rank_are_merged_first():
    values = torch.cat(values_of("even"))
    rows = [parts_of(part) for part in values.split([10, 0, 600, 390])]
    rows[1] = {}  # a row without a response token may leave metrics out
    merged = merge(rows)
    assert list(merged) == list(parts_of(values))
    assert reduce(merged, alone) == pytest.approx(reduce(parts_of(values), alone), rel=1e-15)
    with pytest.raises(ValueError, match="a/max: expected metrics of one kind"):
        merge([{"a/max": Max(1.0)}, {"a/max": Sum(1.0)}])
    other = replace(figures_of(values), finish=lambda sums, maxima: {})
    with pytest.raises(ValueError, match="a/figures: expected metrics of one kind"):
        merge([{"a/figures": figures_of(values)}, {"a/figures": other}])


def test_sums_are_float64():
    reduced = reduce(
        {"a/sum": Sum(torch.tensor(2.0**53, dtype=torch.float64)), "b/sum": Sum(1 / 3)}, alone
    )
    assert reduced == {"a/sum": 2.0**53, "b/sum": 1 / 3}


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
