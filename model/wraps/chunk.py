"""Dynamic chunking (H-Net, Hwang et al., arXiv 2507.07955): a router cuts the sequence where it changes.

Shape legend: B batch  T time outside  N chunks of the fullest row (time inside)  D width  W width inside

    p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, and 1 where a document starts       boundary: b_t = p_t > 1/2
    inside: the tokens at boundaries, f          z_j = P_j f_j + (1 - P_j) z_{j-1}, P = p at boundaries
    y_t = c_t z_{chunk of t} + R x_t             c = p at boundaries, 1 - p elsewhere; its value is 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.core import Aux, Bottleneck, Cost, Ctx, Docs, Entered, Step, at_least_fp32, docs_of, positions_of
from model.ops.linear import gla
from model.ops.shift import last_token, token_before
from model.registry import wrap
from model.wraps.kept import Counts, Kept, keep_tokens, no_counts

EDGE = 1e-4  # P stays this far from 0 and 1
FLOOR = -9.3  # of log(1 - P), below log(EDGE)


class ChunkState(NamedTuple):
    """counts of tokens and chunks; last [B, D]: newest token; smooth [B, 1, 1, D]: newest z."""

    counts: Counts
    last: Tensor
    smooth: Tensor


class Saved(NamedTuple):
    """x [B, T, D]; p, b and whether a document starts, all [B, T]; where the chunks stand."""

    x: Tensor
    p: Tensor
    boundary: Tensor
    start: Tensor
    kept: Kept


@wrap("chunk")
class Chunk(Bottleneck):
    """The inside sees one token a chunk, where the router found a boundary; every token reads its chunk.

    ratio:  N: tokens a chunk that the ratio loss aims at.
    weight: of the ratio loss n/(n-1) ((n-1) F G + (1-F)(1-G)), F the share of boundaries, G the mean of p;
            it is 1 times the weight where F = G = 1/n.
    width:  W >= D: a learned vector is appended to each chunk; None is D.

    W_q and W_k start as the identity, R at zero. The inside carries the boundary tokens' documents and
    turns rotary encodings by their original positions. State: `ChunkState`.
    Raises ValueError for a ratio of 1 or less, or a width below D.
    """

    def __init__(
        self, dim: int, *, ratio: float = 6.0, weight: float = 0.03, width: int | None = None
    ) -> None:
        super().__init__(dim)
        if ratio <= 1:
            raise ValueError(f"ratio={ratio}: tokens a chunk, more than 1")
        if width is not None and width < dim:
            raise ValueError(f"width={width}: chunks are widened, so want at least the width outside ({dim})")
        self.code_dim, self.merge = width or dim, ratio
        self.ratio, self.weight = ratio, weight
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.residual = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.q_proj.weight)
        nn.init.eye_(self.k_proj.weight)
        nn.init.zeros_(self.residual.weight)
        self.pad = nn.Parameter(torch.zeros(width - dim)) if width is not None and width > dim else None

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> ChunkState:
        smooth = like.new_zeros(batch, 1, 1, self.dim, dtype=at_least_fp32(like.dtype))
        return ChunkState(no_counts(batch, like.device), like.new_zeros(batch, self.dim), smooth)

    # ------------------------------------------------------------------------- the two halves

    def enter(self, x: Tensor, state: ChunkState | None = None, ctx: Ctx | None = None) -> Entered:
        """x [B, T, D] -> code [B, N, W]."""
        B, T, _ = x.shape
        docs, counts = docs_of(ctx), None if state is None else state.counts
        place = positions_of(docs, None if counts is None else counts.seen, B, T, x.device).expand(B, T)
        tokens = torch.ones(B, T, dtype=torch.bool, device=x.device) if docs is None else docs.tokens
        start = place == 0
        p = torch.where(start, 1.0, self._change(x, state, docs))
        boundary = tokens & (p > 0.5)
        kept = keep_tokens(boundary, counts, ctx)
        code = kept.gather(x)
        if self.pad is not None:
            code = torch.cat([code, self.pad.to(x.dtype).expand(*code.shape[:2], -1)], dim=-1)
        after = None
        if state is not None and kept.counts is not None:
            after = ChunkState(kept.counts, last_token(x, state.last, docs), state.smooth)
        return Entered(
            code, kept.ctx, Saved(x, p, boundary, start, kept), after, self._aux(p, boundary, tokens)
        )

    def exit(
        self,
        code: Tensor,
        saved: Saved | None = None,
        state: ChunkState | None = None,
        ctx: Ctx | None = None,
    ) -> Step:
        """code [B, N, W] -> y [B, T, D]; `saved` and `state` as `enter` returned them."""
        if saved is None:
            raise ValueError("chunk needs what its `enter` saved")
        x, p, boundary = saved.x, saved.p, saved.boundary
        z, smooth = self._smooth(code[..., : self.dim], saved, None if state is None else state.smooth)
        first = z.new_zeros(z.shape[0], 1, self.dim) if state is None else state.smooth[:, 0].to(z.dtype)
        table = torch.cat([first, z], dim=1)
        # Every document starts with a boundary, so what a token reads is its own document's.
        read = boundary.cumsum(1)[..., None].expand(-1, -1, self.dim)
        sure = torch.where(boundary, p, 1 - p)
        sure = (1 + (sure - sure.detach()))[..., None]
        y = sure * table.gather(1, read) + self.residual(x)
        after = None if state is None or smooth is None else state._replace(smooth=smooth)
        return Step(y.to(x.dtype), after)

    # ------------------------------------------------------------------------- parts

    def _change(self, x: Tensor, state: ChunkState | None, docs: Docs | None) -> Tensor:
        """[B, T]: how unlike the token before each token is, in [0, 1]; of a document's first, anything."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(at_least_fp32(x.dtype))
            before = token_before(x, None if state is None else state.last, docs)
            q = F.linear(before, self.q_proj.weight.to(x.dtype))
            k = F.linear(x, self.k_proj.weight.to(x.dtype))
            return (0.5 - 0.5 * F.cosine_similarity(q, k, dim=-1, eps=1e-6)).clamp(0, 1)

    def _smooth(self, code: Tensor, saved: Saved, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The moving average over chunks [B, N, D], in fp32 at least, and the state after it."""
        with torch.autocast(code.device.type, enabled=False):
            code = code.to(saved.p.dtype)
            P = saved.kept.gather(saved.p[..., None]).clamp(EDGE, 1 - EDGE)
            write = torch.where(saved.kept.gather(saved.start[..., None]), 1.0, P)
            z, after = gla(
                torch.ones_like(P)[..., None], write[..., None], code[:, :, None], torch.log1p(-P)[..., None],
                scale=1.0, state=state, docs=saved.kept.ctx.docs, floor=FLOOR, want_state=state is not None,
            )  # fmt: skip
            return z[:, :, 0], after

    def _aux(self, p: Tensor, boundary: Tensor, tokens: Tensor) -> Aux:
        if p.shape[1] <= 1:
            return Aux()
        count = tokens.sum().clamp_min(1)
        share = boundary.sum() / count
        stats = {"share": share}
        if not self.training:
            return Aux(stats=stats)
        mean, n = (p * tokens).sum() / count, self.ratio
        ratio = n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))
        return Aux({"ratio": self.weight * ratio}, stats)

    def cost(self, T: int) -> Cost:
        """The moving average is elementwise work."""
        number = self.q_proj.weight.element_size()
        return Cost(state_fixed=16.0 + self.dim * (number + max(number, 4)))
