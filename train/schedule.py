"""Learning-rate schedules: a factor on the learning rate as a function of the step.

    wsd       warm-up, stable, decay          cosine   warm-up, then half a cosine down to `final`
    constant  warm-up, stable

A decay may be started ahead of its time (a plateau): it then takes the same share of the shortened run,
or the same number of steps when it was given in steps.
"""

from __future__ import annotations

import math
from typing import Any

from model.schema import ConfigError
from model.sections import ScheduleConfig


class Schedule:
    """The schedule of a run of `steps` optimizer steps; `total` is where it ends, `decay_at` its decay."""

    def __init__(self, config: ScheduleConfig, steps: int) -> None:
        self.config = config
        self.planned = steps
        self.warmup = _steps(config.warmup, steps)
        decay = _steps(config.decay, steps) if config.kind == "wsd" else 0
        if self.warmup + decay > steps:
            raise ConfigError(
                [
                    f"schedule: warm-up ({self.warmup} steps) and decay ({decay}) are longer than the run "
                    f"({steps} steps); give them as shares of the run (below 1), or lengthen run.steps"
                ]
            )
        self.total = steps
        self.decay_at = steps - decay
        self.started: int | None = None  # the step of `start_decay`

    def factor(self, step: int) -> float:
        """Factor on the learning rate for the step with this number, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        c = self.config
        if c.kind == "cosine":
            share = (step - self.warmup) / max(1, self.total - self.warmup)
            return c.final + (1 - c.final) * _fall("cosine", min(1.0, share))
        if c.kind == "constant" or step < self.decay_at:
            return 1.0
        # (k+1)/(d+1): neither end of the decay is spent on a step at the full rate or at the final one.
        share = (step - self.decay_at + 1) / (self.total - self.decay_at + 1)
        return c.final + (1 - c.final) * _fall(c.shape, min(1.0, share))

    def stable(self, step: int) -> bool:
        """Whether the learning rate is at its plateau after `step` steps: between warm-up and decay."""
        return self.config.kind != "cosine" and self.warmup < step < self.decay_at

    def start_decay(self, step: int) -> None:
        """Begin the decay at `step`, ahead of time; a schedule without a decay ends there.

        Raises ValueError for a cosine, which has no stable part to leave.
        """
        if self.config.kind == "cosine":
            raise ValueError("a cosine schedule has no stable part that a plateau could end")
        if step >= self.decay_at:
            return
        share = self.config.decay
        if self.config.kind == "constant" or share == 0:
            length = 0
        elif share < 1:
            length = round(step * share / (1 - share))  # so that the decay is that share of the new total
        else:
            length = round(share)
        self.decay_at = self.started = step
        self.total = min(step + length, self.planned)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "decay_at": self.decay_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.decay_at = int(state["total"]), int(state["decay_at"])


def _steps(value: float, total: int) -> int:
    return round(value * total) if value < 1 else round(value)


def _fall(shape: str, share: float) -> float:
    """From 1 to 0 as `share` goes from 0 to 1."""
    if shape == "linear":
        return 1 - share
    if shape == "sqrt":
        return 1 - math.sqrt(share)
    return 0.5 * (1 + math.cos(math.pi * share))
