"""Metrics that carry their reduction over ranks: each rank passes its part and gets one float.

A rank passes sums and counts, never means, so a `Mean` is `sum of sums / sum of counts` in every
layout. Sums are reduced in float64. Keys have the form `topic/what/reduction`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

AllReduce = Callable[[torch.Tensor, str], torch.Tensor]
"""Takes a float64 tensor on the CPU and "sum" or "max", and returns it reduced over all ranks. It
may overwrite its input, and moves it to the device that its process group needs."""

QUANTILES = (0.5, 0.9, 0.99)  # of a histogram that does not name its own

Number = float | torch.Tensor  # a 0-dim tensor stays on its device until `reduce`


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean over all ranks.

    Example: `Mean(sum=12.5, count=40)`; a rank without values passes `Mean(sum=0, count=0)`.
    """

    sum: Number
    count: Number


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum over all ranks. Example: `Sum(1830)`."""

    value: Number


@dataclass(frozen=True, slots=True)
class Max:
    """The maximum over all ranks. Example: `Max(0.31)`; without values `Max(-inf)`."""

    value: Number


@dataclass(frozen=True, slots=True)
class Min:
    """The minimum over all ranks. Example: `Min(0.02)`; without values `Min(inf)`."""

    value: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts between fixed edges, which give quantiles that do not depend on the layout.

    `counts[b]` is the number of values in [edges[b], edges[b+1]); values outside all bins count in
    the first or the last one. Under the key `discrepancy/histogram` it is reported as
    `discrepancy/q50` and so on. The error of a quantile is at most the width of its bin, for values
    between the outer edges.

    Example: `Histogram(edges=(0.0, 0.5, 1.0), counts=torch.tensor([3.0, 1.0]))`.
    """

    edges: tuple[float, ...]  # [B+1] ascending, the same on every rank
    counts: torch.Tensor  # [B] float64
    quantiles: tuple[float, ...] = QUANTILES

    @classmethod
    def of_groups(
        cls,
        values: torch.Tensor,
        groups: torch.Tensor,
        *,
        num_groups: int,
        edges: tuple[float, ...],
        quantiles: tuple[float, ...] = QUANTILES,
    ) -> list[Histogram]:
        """One histogram for each group of values.

        Args:
            values: [N] float, possibly empty.
            groups: [N] int64, from 0 to num_groups - 1.
        """
        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
        bins = torch.bucketize(values.detach().double(), inner, right=True)
        size = len(edges) - 1
        counts = torch.zeros(num_groups * size, dtype=torch.float64, device=values.device)
        # bincount is not used: its length depends on the values, so the host would wait for the
        # device.
        counts.index_add_(0, groups * size + bins, torch.ones_like(bins, dtype=torch.float64))
        return [cls(edges=edges, counts=own, quantiles=quantiles) for own in counts.split(size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Figures computed from sums and maxima after these are reduced over all ranks.

    They are used for standard deviations, correlations and ratios of means. Sums and maxima are one
    vector each, so a hundred figures need no more kernel launches per micro-batch than one. The key
    under which a `Figures` is passed is not reported; `finish` names the keys.

    Example: `Figures(sum_names=("count", "x"), sums=torch.tensor([4.0, 3.0]), max_names=("x",),
    maxima=torch.tensor([1.5]), finish=mean_and_max)` with
    `mean_and_max({"count": 4.0, "x": 3.0}, {"x": 1.5}) == {"x/mean": 0.75, "x/max": 1.5}`.
    """

    sum_names: tuple[str, ...]  # [n]
    sums: torch.Tensor  # [n] float64
    max_names: tuple[str, ...]  # [m]
    maxima: torch.Tensor  # [m] float64, -inf if this rank has no value
    finish: Callable[[dict[str, float], dict[str, float]], dict[str, float]]


Metric = Mean | Sum | Max | Min | Histogram | Figures


def mean_of(values: Sequence[float | bool]) -> Mean:
    """The mean of this rank's values, to be reduced with those of the other ranks."""
    return Mean(sum=float(sum(values)), count=len(values))


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Combine the metrics of one rank's micro-batches, whose keys may differ.

    Raises:
        ValueError: a key has metrics of different kinds, or histograms with different edges.
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
            return Max(_larger(one.value, other.value))
        case Min(), Min():
            return Min(-_larger(-one.value, -other.value))
        case Histogram(), Histogram() if one.edges == other.edges:
            return replace(one, counts=one.counts + other.counts)
        case Figures(), Figures() if (one.sum_names, one.max_names, one.finish) == (
            other.sum_names,
            other.max_names,
            other.finish,
        ):
            maxima = torch.maximum(one.maxima, other.maxima)
            return replace(one, sums=one.sums + other.sums, maxima=maxima)
    raise ValueError(f"{name}: expected metrics of one kind, got {one} and {other}")


def _larger(one: Number, other: Number) -> Number:
    """The maximum, without waiting for the device if both are tensors."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.maximum(one, other)
    return max(one, other)


def reduce(metrics: Mapping[str, Metric], all_reduce: AllReduce) -> dict[str, float]:
    """Reduce every metric over all ranks. A collective: every rank must call it.

    Args:
        metrics: this rank's parts; every rank passes the same keys, kinds and histogram edges.
        all_reduce: the collective, see `AllReduce`.

    Returns:
        The same dict on every rank, sorted by key. A metric that has no value on any rank (count 0,
        no maximum, an empty histogram) is left out.

    Raises:
        ValueError: on every rank, if the ranks passed different metrics.
    """
    names = sorted(metrics)
    _check_same_layout(metrics, names, all_reduce)
    parts = [(_sums(metrics[name]), _maxima(metrics[name])) for name in names]
    # Both collectives run even if one has nothing to reduce, so all ranks make the same calls.
    sums = all_reduce(_flat([part for each, _ in parts for part in each]), "sum").tolist()
    maxima = all_reduce(_flat([part for _, each in parts for part in each]), "max").tolist()
    reduced: dict[str, float] = {}
    for name, (own_sums, own_maxima) in zip(names, parts, strict=True):
        num_sums, num_maxima = _length(own_sums), _length(own_maxima)
        reduced |= _finish(name, metrics[name], sums[:num_sums], maxima[:num_maxima])
        sums, maxima = sums[num_sums:], maxima[num_maxima:]
    return dict(sorted(reduced.items()))


def _check_same_layout(metrics: Mapping[str, Metric], names: list[str], all_reduce: AllReduce):
    """Compare the ranks' metrics; with different ones the collectives would hang or mix values."""
    layout = "\n".join(f"{name} {_layout_of(metrics[name])}" for name in names)
    fingerprint = float(zlib.crc32(layout.encode()))
    largest, smallest = all_reduce(
        torch.tensor([fingerprint, -fingerprint], dtype=torch.float64), "max"
    ).tolist()
    if largest != -smallest:
        raise ValueError(
            "expected the same metrics on every rank (a rank without values passes Mean(sum=0, "
            f"count=0)), got different ones; this rank has: {', '.join(names)}"
        )


def _layout_of(metric: Metric) -> str:
    """The properties that all parts of one metric must share, as text."""
    match metric:
        case Histogram():
            return f"Histogram {metric.edges}"
        case Figures():
            return f"Figures {metric.sum_names} {metric.max_names} {metric.finish.__qualname__}"
    return type(metric).__name__


def _sums(metric: Metric) -> list[Number]:
    """The values that are summed over ranks."""
    match metric:
        case Mean():
            return [metric.sum, metric.count]
        case Sum():
            return [metric.value]
        case Histogram():
            return [metric.counts]
        case Figures():
            return [metric.sums]
    return []


def _maxima(metric: Metric) -> list[Number]:
    """The values that are maximised over ranks."""
    match metric:
        case Max():
            return [metric.value]
        case Min():
            return [-metric.value]
        case Figures():
            return [metric.maxima]
    return []


def _length(parts: list[Number]) -> int:
    return sum(part.numel() if isinstance(part, torch.Tensor) else 1 for part in parts)


def _flat(parts: list[Number]) -> torch.Tensor:
    """[n] float64 on the CPU; values on a device are copied together, in one transfer."""
    pieces = [
        part.detach().reshape(-1).double()
        if isinstance(part, torch.Tensor)
        else torch.tensor([part], dtype=torch.float64)
        for part in parts
    ]
    far = [index for index, piece in enumerate(pieces) if piece.device.type != "cpu"]
    if far:
        sizes = [pieces[index].numel() for index in far]
        near = torch.cat([pieces[index] for index in far]).cpu().split(sizes)
        for index, piece in zip(far, near, strict=True):
            pieces[index] = piece
    return torch.cat([torch.zeros(0, dtype=torch.float64), *pieces])


def _finish(name: str, metric: Metric, sums: list[float], maxima: list[float]) -> dict[str, float]:
    match metric:
        case Mean():
            return {name: sums[0] / sums[1]} if sums[1] else {}
        case Sum():
            return {name: sums[0]}
        case Max():
            return {name: maxima[0]} if maxima[0] != float("-inf") else {}
        case Min():
            return {name: -maxima[0]} if maxima[0] != float("-inf") else {}
        case Figures():
            own_sums = dict(zip(metric.sum_names, sums, strict=True))
            return metric.finish(own_sums, dict(zip(metric.max_names, maxima, strict=True)))
        case Histogram():
            if not sum(sums):
                return {}
            what = name.removesuffix("/histogram")
            return {
                f"{what}/q{100 * q:g}": _quantile(metric.edges, sums, q) for q in metric.quantiles
            }


def _quantile(edges: tuple[float, ...], counts: list[float], quantile: float) -> float:
    """The value below which a share `quantile` lies, if values are uniform within each bin."""
    below, target = 0.0, quantile * sum(counts)
    for low, high, count in zip(edges, edges[1:], counts):
        if count and below + count >= target:
            return low + (high - low) * (target - below) / count
        below += count
    return edges[-1]
