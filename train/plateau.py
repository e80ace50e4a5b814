"""When has a stage stopped learning? The plateau rule that ends it (`grow: {when: plateau}`).

The same held-out rows are scored every `run.eval_every` steps, at a constant learning rate. With l_j the
losses of evaluation j in n groups of rows, paired because the rows are the same,

    drop_j  = mean over groups of (l_{j-W} - l_j) / W           mean fall per evaluation over W of them
    sigma_j = its standard error over the groups

A check holds when drop_j < max(delta * loss_j, 2 sigma_j): the fall is too small to matter, or too small
to be told from nothing. The stage is over when `patience` checks in a row hold and at least
`tokens_per_param` tokens per trainable parameter were seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model.sections import GrowConfig


class Verdict(NamedTuple):
    """drop and threshold in nats per evaluation (None while there is too little history)."""

    reached: bool
    drop: float | None = None
    threshold: float | None = None


@dataclass
class Plateau:
    """The rule and its memory. rows: losses in nats of the last evaluations, by group of rows."""

    delta: float = 0.002
    window: int = 4
    patience: int = 3
    min_tokens: float = 0.0
    history: list[list[float]] = field(default_factory=list)
    hits: int = 0

    @staticmethod
    def of(config: GrowConfig, trainable: int) -> Plateau:
        return Plateau(
            config.delta, config.window, config.patience, min_tokens=config.tokens_per_param * trainable
        )

    def update(self, losses: Sequence[float], tokens: int) -> Verdict:
        """Take one evaluation: mean loss of every group of rows, and the tokens trained on so far."""
        if self.history and len(losses) != len(self.history[-1]):
            raise ValueError(
                f"the held-out rows changed: {len(losses)} groups, {len(self.history[-1])} before"
            )
        self.history = [*self.history, list(losses)][-(self.window + 1) :]
        if len(self.history) <= self.window:
            return Verdict(False)
        drops = [(a - b) / self.window for a, b in zip(self.history[0], self.history[-1])]
        drop = statistics.fmean(drops)
        sigma = statistics.stdev(drops) / len(drops) ** 0.5 if len(drops) > 1 else 0.0
        threshold = max(self.delta * statistics.fmean(losses), 2 * sigma)
        self.hits = self.hits + 1 if drop < threshold else 0
        return Verdict(self.hits >= self.patience and tokens >= self.min_tokens, drop, threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "hits": self.hits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.hits = [list(row) for row in state["history"]], int(state["hits"])
