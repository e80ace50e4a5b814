"""Means with intervals, paired differences, and when a difference counts.

Seeds share their data order, so cases are compared seed by seed: the interval is that of the mean difference
(Student's t, 95 %). Where it holds 0, the two are a tie.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, by degrees of freedom from 1; beyond the table the normal's.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """half: half the width of the 95 % interval, NaN for one value."""

    value: float
    half: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        n = len(values)
        if n < 2:
            return Mean(values[0] if values else math.nan, math.nan, n)
        t = T95[n - 2] if n - 2 < len(T95) else 1.96
        return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n)


def paired(mine: Mapping[int, float], base: Mapping[int, float]) -> Mean:
    """The mean difference over the seeds that both have."""
    return Mean.of([mine[s] - base[s] for s in sorted(mine.keys() & base.keys())])


def verdict(gap: Mean, lower_is_better: bool) -> str:
    """`better`, `worse`, `tie`, or `one seed` where nothing can be said."""
    if gap.count < 2:
        return "one seed" if gap.count else ""
    if abs(gap.value) <= gap.half or gap.value == 0:
        return "tie"
    return "better" if (gap.value < 0) == lower_is_better else "worse"
