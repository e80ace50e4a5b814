"""The combinator: pre-norm residual around a block, and the fading in of a new shell.

Shape legend: B batch  T time  D width of the stream  C channels of a code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.core import Aux, Block, Cost, Ctx, Docs, State, Step
from model.ops.norm import RMSNorm


class Residual(nn.Module):
    """x -> x + block(norm(x)); a `bare` block brings its own norm and residual and stands alone."""

    def __init__(self, block: Block, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = None if block.bare else RMSNorm(block.dim, norm_eps)
        self.block = block

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return self.block.init_state(batch, like, capacity)

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        if self.norm is None:
            return self.block(x, state, ctx)
        step = self.block(self.norm(x), state, ctx)
        return step._replace(y=x + step.y)

    def cost(self, T: int) -> Cost:
        return self.block.cost(T)


class Faded(nn.Module):
    """How far a grown shell counts: y = (1-s) x + s inner(x), or x + s inner(x).

    s is a buffer, so it is saved, and 0-d, so that moving it never recompiles. At s = 0 and s = 1 the
    result is bit-equal to x and to inner(x).

    While s < 1 the shell is also trained to return the code that it was given (a mean square relative
    to the code's own): at s = 0 the task's loss gives it exactly zero gradient.

    steps, hold: s stays 0 for `hold` steps, then rises along a cosine over `steps`; 0: s = 1 at once.
    code:        weight of the code loss at s = 0; it falls linearly in s to a tenth, and is off at 1.
    """

    s: Tensor

    def __init__(self, steps: int = 0, hold: int = 0, code: float = 1.0) -> None:
        super().__init__()
        self.steps, self.hold, self.code = steps, hold, code
        self.register_buffer("s", torch.tensor(0.0 if steps > 0 else 1.0))

    def advance(self, step: int) -> None:
        """Set s for the optimizer step `step` of this stage (from 0)."""
        if self.steps > 0:
            share = min(max((step - self.hold) / self.steps, 0.0), 1.0)
            self.s.fill_(0.5 - 0.5 * math.cos(math.pi * share) if share < 1 else 1.0)

    @property
    def done_at(self) -> int:
        """The first step at which the shell counts fully."""
        return self.hold + self.steps if self.steps > 0 else 0

    def forward(self, x: Tensor, inner: Tensor, residual: bool, docs: Docs | None) -> Step:
        """x, inner: [B, T, C]. Returns the mixture and, while it is training, the code loss."""
        s = self.s.to(x.dtype)
        y = x + s * inner if residual else torch.lerp(x, inner, s)
        if not (self.training and self.steps > 0) or residual:
            return Step(y)
        target, got = x.detach().float(), inner.float()
        keep = 1.0 if docs is None or not docs.padded else docs.tokens[..., None].float()
        error = ((got - target).square() * keep).sum() / (target.square() * keep).sum().clamp_min(1e-12)
        weight = self.code * (1 - 0.9 * self.s) * (self.s < 1)
        return Step(
            y, aux=Aux({"code": weight * error}, {"fade": self.s.clone(), "code_error": error.detach()})
        )
