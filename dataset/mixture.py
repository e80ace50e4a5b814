"""Several datasets in fixed proportions, changing at set points: who gives sample n is arithmetic.

Shape legend: b rows  C context  P period of a stage's schedule.

Every stage has integer weights and a periodic table (see `order.chairman`), so that after any n samples of a
stage each source is within one of its share. A source goes on where the last stage left it, in epochs of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np

from dataset.files import DatasetError, canonical, digest
from dataset.order import chairman
from dataset.packing import Arrays
from dataset.views import Samples

FINEST = 10_000  # weights are resolved to this: a period has at most so many samples


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest integers in the same proportions. Raises DatasetError.

    Fractions that no period of 10,000 expresses are rounded to it; a weight above zero stays above zero.
    """
    numbers = all(isinstance(w, Real) and not isinstance(w, bool) and math.isfinite(w) for w in weights)
    if not numbers or not weights or min(weights) < 0 or sum(weights) <= 0:
        raise DatasetError(
            f"mixture weights {list(weights)}: want numbers, at least one of them positive, none negative"
        )
    exact = [Fraction(str(w)) for w in weights]
    scale = np.lcm.reduce([f.denominator for f in exact], dtype=object)
    whole = [int(f * scale) for f in exact]
    if sum(whole) // np.gcd.reduce(whole) > FINEST:
        whole = [max(round(FINEST * f / sum(exact)), int(f > 0)) for f in exact]
    divisor = int(np.gcd.reduce(whole))
    return [w // divisor for w in whole]


class _Stage:
    """Proportions from sample `start` on. base: samples that each source gave before, int64 [sources]."""

    def __init__(self, start: int, weights: list[int], base: np.ndarray) -> None:
        self.start, self.base = start, base
        self.weights = np.array(weights, np.int64)
        self.period = int(self.weights.sum())
        self.table = chairman(weights)
        self.before = np.zeros(self.period, np.int64)  # draws of the same source earlier in the period
        for i in range(len(weights)):
            mine = self.table == i
            self.before[mine] = np.arange(int(mine.sum()))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample number within the source), int64 [b]."""
        periods, within = np.divmod(samples - self.start, self.period)
        source = self.table[within].astype(np.int64)
        return source, self.base[source] + periods * self.weights[source] + self.before[within]

    def given(self, samples: int) -> np.ndarray:
        """int64 [sources]: samples that each source has given after `samples` of this stage."""
        periods, within = divmod(samples, self.period)
        counts = np.bincount(self.table[:within], minlength=len(self.weights))
        return self.base + periods * self.weights + counts


class Mixture(Samples):
    """Views drawn from in proportion.

    views:  {name: view}, all of one context and tokenizer. Sidecars are weights for all that have one (the
            others weigh 1), or reference losses, which every source then needs.
    stages: [(first sample, {name: weight})], the first at sample 0; a name left out weighs 0.
    Raises DatasetError for unknown names, unordered stages, views that do not go together.
    """

    def __init__(
        self, views: Mapping[str, Samples], stages: Sequence[tuple[int, Mapping[str, float]]]
    ) -> None:
        self.names, self.views = list(views), list(views.values())
        self._check(stages)
        first = self.views[0]
        self.rows = sum(view.rows for view in self.views)
        self.context, self.text_bytes, self.narrow = first.context, first.text_bytes, first.narrow
        self.tokenizer_identity = first.tokenizer_identity
        self.side_kind = self._side_kind()
        self._stages: list[_Stage] = []
        base = np.zeros(len(self.views), np.int64)
        for start, weights in stages:
            if self._stages:
                base = self._stages[-1].given(start - self._stages[-1].start)
            whole = integer_weights([weights.get(name, 0) for name in self.names])
            self._stages.append(_Stage(start, whole, base))
        self._starts = np.array([s.start for s in self._stages])
        self.settings: dict[str, Any] = {
            "views": {name: view.id for name, view in views.items()},
            "stages": [[s.start, s.weights.tolist()] for s in self._stages],
        }
        self.id = digest(canonical(self.settings))

    def _check(self, stages: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        if not self.views:
            raise DatasetError("a mixture needs at least one source")
        for what in ("context", "tokenizer_identity"):
            values = {name: getattr(view, what) for name, view in zip(self.names, self.views)}
            if len(set(values.values())) > 1:
                raise DatasetError(f"mixture: the sources differ in {what}: {values}")
        starts = [start for start, _ in stages]
        for _, weights in stages:
            if not isinstance(weights, Mapping):
                raise DatasetError(f"mixture: weights {weights!r}: a mapping of sources to numbers is needed")
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise DatasetError(f"mixture: stages must start at 0 and increase, got {starts}")
        for _, weights in stages:
            if unknown := set(weights) - set(self.names):
                names = ", ".join(self.names)
                raise DatasetError(f"mixture: unknown source {sorted(unknown)[0]!r}; the sources are {names}")

    def _side_kind(self) -> str | None:
        """Of every source's values. A loss of 0 where none was taken would pass for a perfect one."""
        kinds = {name: view.side_kind for name, view in zip(self.names, self.views)}
        if set(kinds.values()) <= {"weight", None}:
            return "weight" if any(kinds.values()) else None
        if set(kinds.values()) != {"loss"}:
            raise DatasetError(
                f"mixture: the kinds of the sources' sidecars do not go together: {kinds}. Give every "
                "source one of losses, or weights or none"
            )
        return "loss"

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source number, its own sample number), int64 [b] each."""
        source, number = np.empty_like(samples), np.empty_like(samples)
        stage = np.searchsorted(self._starts, samples, "right") - 1
        for k in np.unique(stage).tolist():
            here = stage == k
            source[here], number[here] = self._stages[k].locate(samples[here])
        return source, number

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been gone through after `samples` samples."""
        stage = self._stages[int(np.searchsorted(self._starts, samples, "right")) - 1]
        given = stage.given(samples - stage.start).tolist()
        return {name: n / view.rows for name, n, view in zip(self.names, given, self.views)}

    def arrays(self, samples: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        source, number = self.locate(samples)
        parts = []
        for i in np.unique(source).tolist():
            at = np.flatnonzero(source == i)
            parts.append((at, self.views[i].arrays(number[at], dtype)))
        return parts[0][1] if len(parts) == 1 else _scatter(parts, len(samples), self.context)


def _scatter(parts: list[tuple[np.ndarray, Arrays]], b: int, C: int) -> Arrays:
    """Rows of several reads put where they belong."""
    tokens = np.empty((b, C), parts[0][1].tokens.dtype)
    some = {key: any(getattr(a, key) is not None for _, a in parts) for key in ("lengths", "mask", "side")}
    lengths = np.full(b, C, np.int64) if some["lengths"] else None
    mask = np.ones((b, C), np.uint8) if some["mask"] else None
    side = np.ones((b, C), np.float32) if some["side"] else None  # weights of the sources without any
    bounds = [np.array([b * C])]
    for at, one in parts:
        tokens[at] = one.tokens
        for into, value in ((lengths, one.lengths), (mask, one.mask), (side, one.side)):
            if into is not None and value is not None:
                into[at] = value
        row, within = np.divmod(one.cu_seqlens[:-1].astype(np.int64), C)
        bounds.append(at[row] * C + within)
    return Arrays(tokens, np.unique(np.concatenate(bounds)).astype(np.int32), lengths, mask, side)
