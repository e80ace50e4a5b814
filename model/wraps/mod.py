"""Mixture of depths (Raposo et al., arXiv 2404.02258): a router lets some tokens through, the rest pass by.

Shape legend: B batch  T time  N kept tokens of the fullest row  D model width

    s_t = w . rms(x_t)      kept: y_t = x_t + g_t (f(x)_t - x_t), g = sigmoid(s)      others: y_t = x_t
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.core import Aux, Bottleneck, Cost, Ctx, Docs, Entered, Step, docs_of
from model.ops.selection import Selector
from model.registry import wrap
from model.wraps.kept import Counts, Kept, keep_tokens, no_counts


class Saved(NamedTuple):
    """x [B, T, D] and its kept tokens [B, N, D], their gates [B, N, 1], and where they stand."""

    x: Tensor
    code: Tensor
    gate: Tensor
    kept: Kept


@wrap("mod")
class MixtureOfDepths(Bottleneck):
    """The inside sees the share `keep` of the tokens, chosen by a learned score; the others stay as they are.

    router: `threshold` keeps a token whose score exceeds a moving average of the scores' (1 - keep)-quantile,
            so a token is chosen by itself and past batches alone: causal, in training too. The share is
            met on average.
            `topk` keeps the ceil(keep * n) best of a document of n tokens, as published. That looks ahead,
            so it has no state: no generation, and no split documents.
    gate:   `sigmoid` scales what the inside changed; `straight` does not, but has the sigmoid's gradient.
    decay:  of the moving average, per optimizer step; see `model.ops.selection`.
    width:  None or the width outside.

    The inside carries the kept tokens' documents, and turns rotary encodings by their original positions;
    windows count kept tokens. State: `Counts` (`threshold`).
    Raises ValueError for keep outside (0, 1], another width, and by `init_state` of `topk`.
    """

    def __init__(
        self,
        dim: int,
        *,
        keep: float = 0.125,
        router: Literal["threshold", "topk"] = "threshold",
        gate: Literal["sigmoid", "straight"] = "sigmoid",
        decay: float = 0.5,
        width: int | None = None,
    ) -> None:
        super().__init__(dim)
        if width not in (None, dim):
            raise ValueError(f"width={width}: mod passes tokens by, so the inside has the same width ({dim})")
        self.select = Selector(dim, keep, decay)
        self.code_dim, self.merge = dim, 1 / keep
        self.keep, self.router, self.gate = keep, router, gate

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> Counts:
        if self.router == "topk":
            raise ValueError(
                "mod: the router `topk` compares a token with later ones, so it cannot run token by token;"
                " generate with `router: threshold`"
            )
        return no_counts(batch, like.device)

    # ------------------------------------------------------------------------- the two halves

    def enter(self, x: Tensor, state: Counts | None = None, ctx: Ctx | None = None) -> Entered:
        """x [B, T, D] -> code [B, N, D]."""
        docs = docs_of(ctx)
        score = self.select(x)
        tokens = torch.ones_like(score, dtype=torch.bool) if docs is None else docs.tokens
        if self.router == "topk":
            keep = tokens & best(score.detach(), self.keep, docs)
        else:
            keep = self.select.choose(score, tokens)
        kept = keep_tokens(keep, state, ctx)
        code = kept.gather(x)
        gate = torch.sigmoid(kept.gather(score[..., None]))
        if self.gate == "straight":
            gate = 1 + (gate - gate.detach())
        stats = {"kept": keep.sum() / tokens.sum().clamp_min(1)} if x.shape[1] > 1 else {}
        return Entered(code, kept.ctx, Saved(x, code, gate.to(x.dtype), kept), kept.counts, Aux(stats=stats))

    def exit(
        self,
        code: Tensor,
        saved: Saved | None = None,
        state: Counts | None = None,
        ctx: Ctx | None = None,
    ) -> Step:
        """code [B, N, D] -> y [B, T, D]; `saved` and `state` as `enter` returned them."""
        if saved is None:
            raise ValueError("mod needs what its `enter` saved")
        change = saved.gate * (code - saved.code)
        return Step(saved.x + saved.kept.scatter(change, saved.x.shape[1]), state)

    def cost(self, T: int) -> Cost:
        return Cost(state_fixed=16.0)  # two counts


def best(score: Tensor, share: float, docs: Docs | None) -> Tensor:
    """[B, T] bool: the ceil(share * n) tokens of highest score [B, T] in every document of n tokens."""
    B, T = score.shape
    docs = Docs.whole(B, T, score.device) if docs is None else docs
    lengths = docs.cu_seqlens.diff().long()
    length = torch.repeat_interleave(lengths, lengths, output_size=B * T).view(B, T)
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    by_document = torch.argsort(docs.segments.gather(1, order), dim=1, stable=True)
    order = order.gather(1, by_document)  # by document, then score
    place = torch.arange(T, device=score.device).expand(B, T)
    ordered = docs.segments.gather(1, order)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    within = place - torch.where(new, place, 0).cummax(1).values if T else place
    rank = torch.zeros_like(order).scatter(1, order, within)
    return rank < torch.ceil(share * length - 1e-9)
