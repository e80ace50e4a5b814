"""Sums between two log lines. They are part of the training state: a resumed run logs the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over the whole global batch.

    sums:    {head: (nats, weight of supervised tokens)}.
    aux:     auxiliary losses, already weighted.     loss: weighted heads + aux, what was minimised.
    refused: why the step was not taken, or None; see train.guard.
    seconds: wall clock.   cpu_seconds: of this process, which other programs do not lengthen.
    """

    loss: float
    sums: dict[str, tuple[float, float]]
    aux: float
    grad_norm: float
    lr: float
    refused: str | None
    tokens: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Meter:
    """Sums over the steps since the last log line, and the seconds of the whole run (wall clock, CPU)."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    aux: float = 0.0
    grad_norm: float = 0.0
    heads: dict[str, list[float]] = field(default_factory=dict)
    run_seconds: float = 0.0
    run_cpu_seconds: float = 0.0

    def add(self, result: StepResult) -> None:
        self.seconds += result.seconds
        self.run_seconds += result.seconds
        self.run_cpu_seconds += result.cpu_seconds
        self.tokens += result.tokens
        if result.refused:
            return  # its losses are not finite, or far off, and would hide the others
        self.steps += 1
        self.loss += result.loss
        self.aux += result.aux
        self.grad_norm += result.grad_norm
        for head, (nats, weight) in result.sums.items():
            sums = self.heads.setdefault(head, [0.0, 0.0])
            sums[0] += nats
            sums[1] += weight

    def read(self) -> dict[str, Any]:
        """Means since the last reading, and a new start. Losses are in nats per supervised token."""
        n = self.steps or math.nan
        means = {
            "loss": self.loss / n,
            "losses": {head: nats / weight for head, (nats, weight) in self.heads.items() if weight},
            "aux": self.aux / n,
            "grad_norm": self.grad_norm / n,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else math.nan,
            "seconds": self.run_seconds,
            "cpu_seconds": self.run_cpu_seconds,
        }
        self.__init__(run_seconds=self.run_seconds, run_cpu_seconds=self.run_cpu_seconds)  # type: ignore[misc]
        return means

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
