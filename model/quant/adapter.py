"""The way into an inner onion shell: from the outer code's channels to the shell's width, and back.

Shape legend: B batch  T time outside  G groups (time inside)  C outer channels  W inner width  K merge

    enter: u = U pool(z)        exit: z' = V f(u)

U starts orthonormal and V as its transpose, so that an inner shell that does nothing gives the code back
(W >= C). With `merge: K`, group g of a document covers its positions gK .. gK+K-1 and makes one inner
position; a trailing group that is not complete makes none. On the way out group g stands at positions
gK+K-1 .. gK+2K-2, that is, shifted right by K-1: nobody reads a group before it is complete. Positions
before K-1 read zero. Groups never span documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.core import Bottleneck, Cost, Ctx, Entered, Step, at_least_fp32, docs_of
from model.quant.merge import make_layout, whole_rows
from model.registry import did_you_mean

POOLS = ("mean", "gated", "mlp")


class MergeState(NamedTuple):
    """pending [B, K-1, C]: tokens of the incomplete group, right-aligned after zeros.
    newest [B, C]: what the newest complete group gives to outer positions.
    seen [B] int64: tokens of the row's document so far.
    """

    pending: Tensor
    newest: Tensor
    seen: Tensor


class Saved(NamedTuple):
    """What `exit` needs: see `merge.Layout`; groups is None without a state."""

    read: Tensor
    groups: Tensor | None = None


class Adapter(Bottleneck):
    """C channels -> width W, `merge` positions into one; owned by the inner shell.

    width: W; None is C.      merge: K, 1 keeps the length.
    pool:  how K tokens make one (K > 1):
           mean   their mean                    gated  weights from a softmax of a learned score per token
           mlp    mean + W2 gelu(W1 [z_1 .. z_K])          gated and mlp start as the mean

    State: `MergeState`, or None when K = 1. Of t new tokens about t / K come out of `enter`, none for most
    single steps; its ctx tells the inside where documents lie.
    Raises ValueError when width or merge is below 1 or pool is unknown.
    """

    merge: int

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        merge: int = 1,
        pool: Literal["mean", "gated", "mlp"] = "mean",
    ) -> None:
        super().__init__(dim)
        width = dim if width is None else width
        if width < 1 or merge < 1:
            raise ValueError(f"width={width} and merge={merge} must be at least 1")
        if pool not in POOLS:
            raise ValueError(f"no pool called {pool!r}{did_you_mean(pool, POOLS)}")
        self.code_dim, self.merge, self.pool = width, merge, pool
        self.u = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(width, dim, bias=False)
        nn.init.orthogonal_(self.u.weight)
        with torch.no_grad():
            self.v.weight.copy_(self.u.weight.T)
        if merge > 1 and pool == "gated":
            self.score = nn.Linear(dim, 1, bias=False)
            nn.init.zeros_(self.score.weight)
        if merge > 1 and pool == "mlp":
            self.mix_in = nn.Linear(merge * dim, 2 * dim)
            self.mix_out = nn.Linear(2 * dim, dim, bias=False)
            nn.init.zeros_(self.mix_out.weight)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a description says."""
        return (f"{self.pool} pool",) if self.merge > 1 and self.pool != "mean" else ()

    def zero_exit(self) -> None:
        """Let the inside give nothing at first: a residual shell is then inserted without a trace."""
        nn.init.zeros_(self.v.weight)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> MergeState | None:
        if self.merge == 1:
            return None
        return MergeState(
            like.new_zeros(batch, self.merge - 1, self.dim),
            like.new_zeros(batch, self.dim),
            torch.zeros(batch, dtype=torch.int64, device=like.device),
        )

    # ------------------------------------------------------------------------- the two halves

    def enter(self, x: Tensor, state: MergeState | None = None, ctx: Ctx | None = None) -> Entered:
        """x [B, T, C] -> code [B, G, W]."""
        if self.merge == 1:
            return Entered(self.u(x).to(x.dtype), ctx)
        B, T, _ = x.shape
        docs = docs_of(ctx)
        if docs is None and state is None:
            groups = x[:, : T // self.merge * self.merge].unflatten(1, (-1, self.merge))
            read = whole_rows(T, self.merge, x.device).expand(B, T)
            return Entered(self._into(groups, x), ctx, Saved(read))
        seen = None if state is None else state.seen
        layout = make_layout(docs, seen, self.merge, B, T, x.device)
        before = x.new_zeros(B, self.merge - 1, self.dim) if state is None else state.pending.to(x.dtype)
        tokens = torch.cat([before, x], dim=1)
        code = self._into(_rows(tokens, layout.members), x)
        if layout.docs is not None:
            ctx = replace(ctx or Ctx(), docs=layout.docs, places=None)
        if state is None:
            return Entered(code, ctx, Saved(layout.read))
        pending = _rows(tokens, layout.pending) * layout.held[..., None]
        after = MergeState(pending.to(state.pending.dtype), state.newest, layout.seen)
        return Entered(code, ctx, Saved(layout.read, layout.groups), after)

    def exit(
        self,
        code: Tensor,
        saved: Saved | None = None,
        state: MergeState | None = None,
        ctx: Ctx | None = None,
    ) -> Step:
        """code [B, G, W] -> y [B, T, C]; `saved` and `state` as `enter` returned them."""
        y = self.v(code).to(code.dtype)
        if self.merge == 1:
            return Step(y)
        if saved is None:
            raise ValueError("an adapter that merges needs what its `enter` saved")
        nothing = y.new_zeros(y.shape[0], 1, self.dim)
        newest = nothing if state is None else state.newest[:, None].to(y.dtype)
        table = torch.cat([nothing, newest, y], dim=1)
        if state is not None and saved.groups is not None:
            # A document without a group has nothing to give; what stands here would be another's.
            own = (state.seen >= self.merge)[:, None]
            last = _rows(table, saved.groups[:, None] + 1)[:, 0] * own
            state = state._replace(newest=last.to(state.newest.dtype))
        return Step(_rows(table, saved.read), state)

    def _into(self, groups: Tensor, x: Tensor) -> Tensor:
        """groups [B, G, K, C] -> [B, G, W] in x's dtype."""
        if self.pool == "gated":
            score = self.score(groups).to(at_least_fp32(x.dtype))
            weight = F.softmax(score, dim=2).to(x.dtype)
            pooled = (weight * groups).sum(2)
        else:
            pooled = groups.mean(2)
        if self.pool == "mlp":
            pooled = pooled + self.mix_out(F.gelu(self.mix_in(groups.flatten(2)))).to(x.dtype)
        return self.u(pooled).to(x.dtype)

    def cost(self, T: int) -> Cost:
        """Linears run once per group and not once per token, but for the score of every grouped token."""
        if self.merge == 1:
            return Cost()
        G = T // self.merge
        linears = sum(2.0 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        scores = 2.0 * self.dim * G * (self.merge - 1) if self.pool == "gated" else 0.0
        width = self.u.weight.element_size() * self.dim
        return Cost(flops=linears * (G - T) + scores, state_fixed=width * self.merge + 8)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C], index [B, ...] -> [B, ..., C]."""
    flat = index.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, index.shape[1:])
