"""When has a stage stopped learning? The plateau rule that ends it (`grow: {when: plateau}`).

The same held-out rows are scored every `run.eval_every` steps, at a constant learning rate. With l_j the
losses of evaluation j in n groups of rows, paired because the rows are the same,

    drop_j  = mean over groups of (l_{j-W} - l_j) / W           mean fall per evaluation over W of them
    sigma_j = its standard error over the groups

A check holds when drop_j < max(delta * loss_j, 2 sigma_j): the fall is too small to matter, or too small
to be told from nothing. The stage is over when `patience` checks in a row hold and at least
`tokens_per_param` tokens per trainable parameter were seen.

From the third stage on a stage must also have spent the speed that its new parts brought: the fall of the
loss per FLOP, over the window, must be below `slope` times what it was over the stage's first full window,
just after the last insertion.

Under diloco and streaming every worker scores its own model; worker 0's verdict counts (`outer.lockstep`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model.sections import GrowConfig


class Verdict(NamedTuple):
    """drop and threshold in nats per evaluation (None while there is too little history).

    slope: fall of the loss per FLOP, as a share of what it was in the stage's first window.
    """

    reached: bool
    drop: float | None = None
    threshold: float | None = None
    slope: float | None = None


@dataclass
class Plateau:
    """The rule and its memory.

    stage:   1 for a model trained from scratch, one more for each growth.
    history: losses in nats of the last evaluations, by group of rows; flops: spent until each.
    first:   nats per FLOP over the stage's first window, once it is known.
    verdict: on the last evaluation.
    """

    delta: float = 0.002
    window: int = 4
    patience: int = 3
    min_tokens: float = 0.0
    slope: float = 0.7
    stage: int = 1
    history: list[list[float]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    first: float | None = None
    hits: int = 0
    verdict: Verdict = Verdict(False)

    @staticmethod
    def of(config: GrowConfig, trainable: int, stage: int = 1) -> Plateau:
        tokens = config.tokens_per_param * trainable
        return Plateau(config.delta, config.window, config.patience, tokens, config.slope, stage)

    def update(self, losses: Sequence[float], tokens: int, flops: float | None = None) -> Verdict:
        """Take one evaluation: mean loss of every group of rows, tokens trained on and FLOPs spent so far.

        Without FLOPs, evaluations are taken to be equally far apart.
        """
        self.verdict = self._judge(losses, tokens, flops)
        return self.verdict

    def _judge(self, losses: Sequence[float], tokens: int, flops: float | None) -> Verdict:
        if self.history and len(losses) != len(self.history[-1]):
            raise ValueError(
                f"the held-out rows changed: {len(losses)} groups, {len(self.history[-1])} before"
            )
        self.history = [*self.history, list(losses)][-(self.window + 1) :]
        spent = (self.flops[-1] + 1.0 if self.flops else 0.0) if flops is None else flops
        self.flops = [*self.flops, spent][-(self.window + 1) :]
        if len(self.history) <= self.window:
            return Verdict(False)
        drops = [(a - b) / self.window for a, b in zip(self.history[0], self.history[-1])]
        drop = statistics.fmean(drops)
        sigma = statistics.stdev(drops) / len(drops) ** 0.5 if len(drops) > 1 else 0.0
        threshold = max(self.delta * statistics.fmean(losses), 2 * sigma)
        slope = drop * self.window / max(self.flops[-1] - self.flops[0], 1e-9)
        if self.first is None:
            self.first = slope
        share = slope / self.first if self.first > 0 else 0.0  # a stage that began flat has nothing to spend
        flat = drop < threshold and (self.stage < 3 or share < self.slope)
        self.hits = self.hits + 1 if flat else 0
        return Verdict(self.hits >= self.patience and tokens >= self.min_tokens, drop, threshold, share)

    def state_dict(self) -> dict[str, Any]:
        memory = {"history": self.history, "hits": self.hits, "flops": self.flops, "first": self.first}
        return {**memory, "verdict": list(self.verdict)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.hits = [list(row) for row in state["history"]], int(state["hits"])
        self.flops = list(state.get("flops", range(len(self.history))))
        self.first = state.get("first")
        self.verdict = Verdict(*state.get("verdict", (False,)))
