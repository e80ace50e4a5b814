"""Predictions that read one trunk state each: of one token, or of the next n side by side.

Shape legend: B batch  T time  D model width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.combine import Residual
from model.core import Cost, Ctx, State, Step, docs_of
from model.flops import linear_flops
from model.heads.base import Head, HeadCost, HeadStep, Reading, Words, readouts_of
from model.heads.targets import shift_targets, shift_weights
from model.ops.norm import RMSNorm
from model.registry import make_block
from model.schema import HeadConfig


class SingleHead(Head):
    """An optional residual MLP of its own, a norm, the table: the token `shift` places on (0: itself)."""

    speaks = True

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.readouts = readouts_of([config.shift], config.weight)
        self.shift = config.shift
        self.ffn = None if config.ffn is None else Residual(make_block("mlp", dim, **config.ffn), norm_eps)
        self.norm = RMSNorm(dim, norm_eps)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return None if self.ffn is None else self.ffn.init_state(batch, like, capacity)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None, words: Words | None = None
    ) -> HeadStep:
        step = Step(x, state) if self.ffn is None else self.ffn(x, state, ctx)
        y = self.norm(step.y)
        if words is None or words.labels is None:
            return HeadStep(y, step.state, aux=step.aux)
        targets = shift_targets(words.labels, self.shift, docs_of(ctx))
        weights = None if words.weights is None else shift_weights(words.weights, self.shift).flatten()
        found = Reading(y.flatten(0, 1), targets.flatten(), weights)
        return HeadStep(y, step.state, {"": [found]}, step.aux)

    def cost(self, T: int, vocab: int) -> HeadCost:
        rest = Cost() if self.ffn is None else self.ffn.cost(T)
        return HeadCost(linear_flops(self) * T, rest, 2.0 * vocab * self.dim * T)


class ParallelHead(Head):
    """n single heads on one trunk, for shifts 1..n (Gloeckle et al., arXiv 2404.19737).

    n = 1 is the single head of shift 1. Those after the first draft.
    Raises ValueError for an MLP that keeps a state.
    """

    speaks = True

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(dim)
        if (config.ffn or {}).get("act") == "rwkv":
            raise ValueError("ffn.act: rwkv keeps a state, which a parallel head does not; use single heads")
        self.readouts = readouts_of(list(range(1, config.size + 1)), config.weight)
        self.reach = config.size - 1
        self.heads = nn.ModuleList(
            SingleHead(dim, replace(config, shift=shift), norm_eps) for shift in range(1, config.size + 1)
        )

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None, words: Words | None = None
    ) -> HeadStep:
        if words is None or words.labels is None:
            return self.heads[0](x, None, ctx)
        steps = [head(x, None, ctx, words) for head in self.heads]
        found = {name: step.readings[""] for name, step in zip(self.readouts, steps, strict=True)}
        return HeadStep(steps[0].y, None, found)

    def draft(
        self, x: Tensor, state: State | None, words: Words, n: int, pick: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.check_reach(n)
        return pick(torch.cat([head(x).y for head in list(self.heads)[1 : n + 1]], dim=1))

    def cost(self, T: int, vocab: int) -> HeadCost:
        return HeadCost(linear_flops(self) * T, Cost(), 2.0 * vocab * self.dim * T * len(self.heads))
