"""DiLoCo (2311.08105): H inner steps apart, one outer step together.

    θᵢ <- θ;  H inner steps;  Δ = (1/k) Σ (θ - θᵢ);  θ <- Outer(θ, Δ)

Inner optimizer states stay where they are. k = 1 is allowed and is not the same as no outer loop.
"""

from __future__ import annotations

from typing import Any

from train.outer.lockstep import Lockstep


class DiLoCo(Lockstep):
    """All tensors at once, every H steps and after the last step of the run."""

    def maybe_sync(self, state: Any) -> None:
        """Called after every inner step. Raises UserError when replicas differ."""
        if state.step % self.config.every and state.step != state.schedule.total:
            return
        self.stopped = self.hear(state, self.compare(self.card(state)))
        for r in self.replicas:
            r.step(r.channel.mean(r.delta()))
            r.adopt()
        self.traffic.rounds += 1
