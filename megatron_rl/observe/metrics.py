"""Metrics that carry their reduction: every rank's part in, one float for the whole world out.

A rank hands over sums and counts, never means, so that `Mean` is `sum of sums / sum of counts`
whatever the layout. Sums travel in float64. Keys read `station/what/reduction`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

AllReduce = Callable[[torch.Tensor, str], torch.Tensor]
"""Takes a float64 tensor on the CPU and "sum" or "max", returns it reduced over all ranks; it may
write over its input, and moves it to the device its process group needs."""

Number = float | torch.Tensor  # a 0-dim tensor stays on its device until `reduce`


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Example: `Mean(sum=12.5, count=40)`; a rank without values gives `Mean(sum=0, count=0)`."""

    sum: Number
    count: Number


@dataclass(frozen=True, slots=True)
class Sum:
    """Example: `Sum(1830)`."""

    value: Number


@dataclass(frozen=True, slots=True)
class Max:
    """Example: `Max(0.31)`; a rank without values gives `Max(-inf)`."""

    value: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts between fixed edges, from which quantiles are read that no layout changes.

    `counts[b]` is of values in [edges[b], edges[b+1]); what lies outside all of them is counted in
    the first or the last bin. Under the key `discrepancy/histogram` it gives `discrepancy/q50` and
    so on. A quantile is off by at most the width of its bin, for values between the outer edges.

    Example: `Histogram(edges=(0.0, 0.5, 1.0), counts=(3, 1))`.
    """

    edges: tuple[float, ...]  # [B+1] ascending, the same on every rank
    counts: tuple[float, ...]  # [B]
    quantiles: tuple[float, ...] = field(default=(0.5, 0.9, 0.99))

    @classmethod
    def of(cls, values: torch.Tensor, *, edges: tuple[float, ...]) -> Histogram:
        """Counts `values` (any shape and float dtype, also empty) into the bins of `edges`."""
        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
        bins = torch.bucketize(values.detach().reshape(-1).double(), inner, right=True)
        counts = torch.bincount(bins, minlength=len(edges) - 1)
        return cls(edges=edges, counts=tuple(counts.tolist()))


Metric = Mean | Sum | Max | Histogram


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """One rank's metrics from those of its micro-batches, whose keys may differ.

    Raises:
        ValueError: a key stands for different kinds of metrics, or for histograms of other edges.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _join(name, merged[name], metric) if name in merged else metric
    return merged


def _join(name: str, one: Metric, other: Metric) -> Metric:
    match one, other:
        case Mean(), Mean():
            return Mean(sum=one.sum + other.sum, count=one.count + other.count)
        case Sum(), Sum():
            return Sum(one.value + other.value)
        case Max(), Max():
            return Max(max(one.value, other.value))
        case Histogram(), Histogram() if one.edges == other.edges:
            counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
            return Histogram(edges=one.edges, counts=counts, quantiles=one.quantiles)
    raise ValueError(f"{name}: expected metrics of one kind, got {one} and {other}")


def reduce(metrics: Mapping[str, Metric], all_reduce: AllReduce) -> dict[str, float]:
    """Reduces every metric over all ranks; a collective, to be called by every rank alike.

    Args:
        metrics: this rank's parts; every rank holds the same keys, kinds and histogram edges.
        all_reduce: the collective, see `AllReduce`.

    Returns:
        The same dict on every rank, in order of keys. A metric without a value on any rank (count
        0, no maximum, an empty histogram) is left out.

    Raises:
        ValueError: on every rank, if ranks hold different metrics.
    """
    names = sorted(metrics)
    _check_same_layout(metrics, names, all_reduce)
    sums = torch.cat([torch.zeros(0, dtype=torch.float64), *(_sums(metrics[n]) for n in names)])
    maxima = torch.cat([torch.zeros(0, dtype=torch.float64), *(_maxima(metrics[n]) for n in names)])
    # Both are called whatever the metrics are, so that ranks never disagree on the number of calls.
    sums, maxima = all_reduce(sums, "sum"), all_reduce(maxima, "max")
    reduced: dict[str, float] = {}
    for name in names:
        metric = metrics[name]
        own_sums, sums = sums.split([len(_sums(metric)), len(sums) - len(_sums(metric))])
        own_maxima, maxima = maxima.split(
            [len(_maxima(metric)), len(maxima) - len(_maxima(metric))]
        )
        reduced |= _finish(name, metric, own_sums.tolist(), own_maxima.tolist())
    return reduced


def _check_same_layout(metrics: Mapping[str, Metric], names: list[str], all_reduce: AllReduce):
    """Before the real collectives, which would hang or mix up values if the layouts differed."""
    layout = "\n".join(
        f"{name} {type(metrics[name]).__name__} {getattr(metrics[name], 'edges', '')}"
        for name in names
    )
    fingerprint = float(zlib.crc32(layout.encode()))
    largest, smallest = all_reduce(
        torch.tensor([fingerprint, -fingerprint], dtype=torch.float64), "max"
    ).tolist()
    if largest != -smallest:
        raise ValueError(
            "expected the same metrics on every rank (a rank without values gives Mean(sum=0, "
            f"count=0)), got different ones; this rank has: {', '.join(names)}"
        )


def _sums(metric: Metric) -> torch.Tensor:
    """[n] float64 on the CPU: what is added over ranks."""
    match metric:
        case Mean():
            return torch.tensor([float(metric.sum), float(metric.count)], dtype=torch.float64)
        case Sum():
            return torch.tensor([float(metric.value)], dtype=torch.float64)
        case Histogram():
            return torch.tensor(metric.counts, dtype=torch.float64)
    return torch.zeros(0, dtype=torch.float64)


def _maxima(metric: Metric) -> torch.Tensor:
    """[n] float64 on the CPU: what the maximum over ranks is taken of."""
    match metric:
        case Max():
            return torch.tensor([float(metric.value)], dtype=torch.float64)
    return torch.zeros(0, dtype=torch.float64)


def _finish(name: str, metric: Metric, sums: list[float], maxima: list[float]) -> dict[str, float]:
    match metric:
        case Mean():
            return {name: sums[0] / sums[1]} if sums[1] else {}
        case Sum():
            return {name: sums[0]}
        case Max():
            return {name: maxima[0]} if maxima[0] != float("-inf") else {}
        case Histogram():
            if not sum(sums):
                return {}
            what = name.removesuffix("/histogram")
            return {
                f"{what}/q{100 * q:g}": _quantile(metric.edges, sums, q) for q in metric.quantiles
            }


def _quantile(edges: tuple[float, ...], counts: list[float], quantile: float) -> float:
    """Where `quantile` of the counts lie below, values spread evenly inside a bin."""
    below, target = 0.0, quantile * sum(counts)
    for low, high, count in zip(edges, edges[1:], counts):
        if count and below + count >= target:
            return low + (high - low) * (target - below) / count
        below += count
    return edges[-1]
