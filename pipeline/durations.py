"""Durations: a histogram of all of them, and percentiles of the most recent ones."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 4096
"""Number of recent durations that percentiles are computed from."""

BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
    0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the histogram's buckets, seconds; closest together in the range of inference
times and live latencies."""

_BOUNDS_NS = tuple(round(bound_s * 1e9) for bound_s in BOUNDS_S)


class Percentiles(NamedTuple):
    """The 50th, 95th and 99th percentile, milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """A snapshot of durations. Cheap to take; percentiles are computed on access.

    Attributes:
        counts: number of durations in each bucket; the last bucket is above all ``BOUNDS_S``.
        sum_s: sum of all durations, seconds.
        recent_ns: ``[n]`` int64, the last ``WINDOW`` at most, in no particular order.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    sum_s: float = 0.0
    recent_ns: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    @property
    def count(self) -> int:
        """Total number of durations."""
        return sum(self.counts)

    @property
    def percentiles_ms(self) -> Percentiles | None:
        """Percentiles of the last ``WINDOW`` durations; None if there are none."""
        return percentiles_ms([self])

    @property
    def mean_ms(self) -> float:
        """Mean of all durations; 0 if there are none."""
        return 1e3 * self.sum_s / max(1, self.count)


class Durations:
    """Collects durations in constant memory. Not thread-safe."""

    def __init__(self) -> None:
        # Not zeros: their pages would be allocated one by one, which looks like a leak.
        self._recent_ns = np.full(WINDOW, -1, np.int64)
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._count = 0
        self._sum_ns = 0

    def add(self, duration_ns: int) -> None:
        """Add a duration, nanoseconds."""
        self._recent_ns[self._count % WINDOW] = duration_ns
        self._counts[bisect_left(_BOUNDS_NS, duration_ns)] += 1
        self._count += 1
        self._sum_ns += duration_ns

    def distribution(self) -> Distribution:
        """Return the current distribution."""
        recent_ns = self._recent_ns[: min(self._count, WINDOW)].copy()
        return Distribution(tuple(self._counts), self._sum_ns / 1e9, recent_ns)


def percentiles_ms(distributions: Iterable[Distribution]) -> Percentiles | None:
    """Return the percentiles of the recent durations of several distributions together.

    They are interpolated linearly (Hyndman and Fan's type 7). None if there are no durations.
    """
    recent_ns = np.concatenate([np.empty(0, np.int64), *(each.recent_ns for each in distributions)])
    if not len(recent_ns):
        return None
    p50, p95, p99 = np.percentile(recent_ns / 1e6, [50, 95, 99])
    return Percentiles(float(p50), float(p95), float(p99))
