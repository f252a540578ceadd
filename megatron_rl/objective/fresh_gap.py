"""The gap of fresh weights: the mean of the constrained signal on tokens that an engine has sampled
with the weights of the last publication. It is the part of a gap that comes from rounding and
kernels; the rest of a batch's gap comes from the age of its rollouts.

    fresh = mean of the last `WINDOW` measurements, one after each publication
    E[delta] - fresh <= c      in place of      E[delta] <= c

The parity probe measures it (`sync/fresh_gap/mean`), over few tokens, and so with an error; the
mean over publications makes it smaller. With `sync.every=4` it reaches back 40 steps.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from megatron_rl.errors import DivergenceError

WINDOW = 10
FRESH_GAP = "sync/fresh_gap/mean"  # the metric of one measurement


class FreshGap:
    """The mean of the last measurements. Ranks that add the same floats hold the same bits."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=WINDOW)
        self._version = -1  # of the newest measurement

    def add(self, gap: float, version: int) -> None:
        """Add the measurement after a publication. One of weights that were measured before, which
        a resumed run and engines that were started again publish once more, does not count.

        Raises:
            DivergenceError: the measurement is not finite.
        """
        if not math.isfinite(gap):
            raise DivergenceError(
                f"gap of fresh weights: expected a finite mean for version {version}, got {gap}"
            )
        if version > self._version:
            self._gaps.append(float(gap))
            self._version = version

    @property
    def value(self) -> float:
        """The mean of the last measurements.

        Raises:
            ValueError: nothing was measured yet; every run publishes before its first step.
        """
        if not self._gaps:
            raise ValueError("gap of fresh weights: expected a measurement before the first step")
        return math.fsum(self._gaps) / len(self._gaps)

    def state_dict(self) -> dict[str, Any]:
        """The last measurements, as plain JSON values."""
        return {"gaps": list(self._gaps), "version": self._version}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue a checkpoint's measurements; None: it has none, and the next is the first."""
        self._gaps.clear()
        self._version = -1
        if state is not None:
            self._gaps.extend(float(each) for each in state["gaps"])
            self._version = int(state["version"])
