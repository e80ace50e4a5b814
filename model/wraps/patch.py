"""Fixed patches: the inside sees every K tokens as one (MegaByte, arXiv 2305.07185; Hourglass, 2110.13711).

Shape legend: B batch  T time outside  G groups (time inside)  D width  W width inside  K tokens of a patch
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from model.core import Bottleneck, Cost, Ctx, Entered, State, Step
from model.quant.adapter import Adapter
from model.registry import wrap


class Saved(NamedTuple):
    """x [B, T, D], and what the adapter saved."""

    x: Tensor
    rest: Any


@wrap("patch")
class Patch(Bottleneck):
    """y = x + V f(U pool(x)): K tokens of a document make one inside, which later tokens read.

    A patch is read from its own last token on, until the next one is complete: shifted right by K - 1, so
    nobody reads ahead. Tokens of the first, incomplete patch read nothing.

    size:  K.
    pool:  how K tokens make one: `mean`, `gated` or `mlp`; see `model.quant.adapter`.
    width: W; None is D.
    State: `merge.MergeState`, None for K = 1.
    Raises ValueError when size or width is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: int = 4,
        pool: Literal["mean", "gated", "mlp"] = "mean",
        width: int | None = None,
    ) -> None:
        super().__init__(dim)
        if size < 1:
            raise ValueError(f"size={size}: a patch has at least one token")
        self.adapter = Adapter(dim, width=width, merge=size, pool=pool)
        self.adapter.v.residual_out = True  # type: ignore[assignment]
        self.code_dim, self.merge = self.adapter.code_dim, size

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return self.adapter.init_state(batch, like, capacity)

    def enter(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Entered:
        """x [B, T, D] -> code [B, G, W]."""
        entered = self.adapter.enter(x, state, ctx)
        return entered._replace(saved=Saved(x, entered.saved))

    def exit(
        self,
        code: Tensor,
        saved: Saved | None = None,
        state: State | None = None,
        ctx: Ctx | None = None,
    ) -> Step:
        """code [B, G, W] -> y [B, T, D]; `saved` and `state` as `enter` returned them."""
        if saved is None:
            raise ValueError("patch needs what its `enter` saved")
        step = self.adapter.exit(code, saved.rest, state, ctx)
        return step._replace(y=saved.x + step.y)

    def cost(self, T: int) -> Cost:
        return self.adapter.cost(T)
