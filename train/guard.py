"""The spike guard: which steps are not worth taking.

A step is refused when its loss or its gradient norm is not finite, or stands more than `sigma` standard
deviations above the mean of the last `window` steps that were taken. Only a full window judges, and refused
steps do not enter it, so one spike neither hides the next nor moves the mean.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from model.sections import RunConfig

NOT_FINITE = "not finite"


class Guard:
    """counts: steps refused so far, by reason."""

    def __init__(self, run: RunConfig) -> None:
        self.sigma, self.window = run.spike_sigma, run.spike_window
        self._seen: dict[str, deque[float]] = {
            name: deque(maxlen=run.spike_window) for name in ("loss", "grad_norm")
        }
        self.counts: dict[str, int] = {}

    def refuses(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must not be taken, or None; takes it into account."""
        values = {"loss": loss, "grad_norm": grad_norm}
        reason = None
        if not all(math.isfinite(v) for v in values.values()):
            reason = NOT_FINITE
        elif self.sigma:
            reason = next((name for name, v in values.items() if self._spikes(name, v)), None)
        if reason is not None:
            self.counts[reason] = self.counts.get(reason, 0) + 1
        elif self.sigma:
            for name, value in values.items():
                self._seen[name].append(value)
        return reason

    def _spikes(self, name: str, value: float) -> bool:
        seen = self._seen[name]
        if len(seen) < self.window:
            return False
        return value > statistics.fmean(seen) + self.sigma * statistics.pstdev(seen)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "seen": {name: list(v) for name, v in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = dict(state["counts"])
        for name, values in state["seen"].items():
            self._seen[name] = deque(values, maxlen=self.window)
