"""A chain of predictions: depth k reads depth k-1 and the token that it has reached (DeepSeek-V3's MTP).

    h^k_t = block_k(W_k [rms h^{k-1}_t ; rms E(x_{t+k})])  ->  x_{t+k+1},   h^0 the trunk   (arXiv 2412.19437)

Shape legend: B batch  T time  D model width  S items of a stream
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.combine import Residual
from model.core import Cost, Ctx, State, docs_of
from model.flops import linear_flops
from model.heads.base import Head, HeadCost, HeadStep, Reading, Words, readouts_of
from model.heads.history import History, docs_of_runs, empty_history, segments_of, splice, tail
from model.heads.targets import shift_targets, shift_weights
from model.ops.norm import RMSNorm
from model.registry import make_block
from model.schema import HeadConfig


class Stream(NamedTuple):
    """Items of one depth: h [B, S, D] at a place, and the newest token that it has read.

    rows: [B, S, D] of that token.   at: [B, S] place in the flattened B*T; -1: before this call.
    segments: [B, S] document; -1 is nothing.   carried: [B] the document that states belong to.
    whole: every row is one unpadded document, and goes on where there is a state.
    """

    h: Tensor
    rows: Tensor
    at: Tensor
    segments: Tensor
    carried: Tensor
    whole: bool


class Link(nn.Module):
    """One depth: join, sliding-window attention, MLP; and the norm that the table reads.

    State: (the item that still waits for its token, the attention's, the MLP's).
    """

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float) -> None:
        super().__init__()
        self.h_norm, self.row_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.join = nn.Linear(2 * dim, dim, bias=False)
        attn = {**(config.attn or {}), "window": config.window}
        self.attn = Residual(make_block("swa", dim, **attn), norm_eps)
        self.ffn = Residual(make_block("mlp", dim, **(config.ffn or {})), norm_eps)
        self.norm = RMSNorm(dim, norm_eps)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        waiting = empty_history(batch, like, 1, self.join.out_features)
        parts = (self.attn, self.ffn)
        return (waiting, *(part.init_state(batch, like, capacity) for part in parts))

    def forward(self, s: Stream, state: State | None) -> tuple[Stream, State | None]:
        """Every item with the token of the item after it, in the same document."""
        waiting: History | None = None if state is None else state[0]
        whole = s.whole and (waiting is None or bool((waiting.held == 1).all()))
        after = None
        h, rows, at, segments = s.h, s.rows, s.at, s.segments
        if waiting is not None:
            way = splice(waiting, segments, s.carried)
            h = way.take(waiting.x.to(h.dtype), h)
            rows = way.take(torch.zeros_like(waiting.x, dtype=rows.dtype), rows)
            at = way.take(at.new_full((len(at), 1), -1), at)
            segments = way.segments
            after = tail(h, segments, 1)
        joined = self.join(torch.cat([self.h_norm(h[:, :-1]), self.row_norm(rows[:, 1:])], dim=-1))
        pair = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] != -1)
        found = torch.where(pair, segments[:, :-1], -1)
        ctx = None if whole else Ctx(docs=docs_of_runs(found, s.carried))
        attn = self.attn(joined, None if state is None else state[1], ctx)
        ffn = self.ffn(attn.y, None if state is None else state[2], ctx)
        out = Stream(ffn.y, rows[:, 1:], at[:, :-1], found, s.carried, whole)
        if waiting is None or after is None:
            return out, None
        return out, (after._replace(x=after.x.to(waiting.x.dtype)), attn.state, ffn.state)

    def cost(self, T: int) -> Cost:
        waiting = Cost(state_fixed=self.join.out_features * self.join.weight.element_size() + 8.0)
        return self.attn.cost(T) + self.ffn.cost(T) + waiting


class ChainHead(Head):
    """`depth` links after the trunk, for shifts 2..depth+1; another head says the next token."""

    def __init__(self, dim: int, config: HeadConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.readouts = readouts_of(list(range(2, config.depth + 2)), config.weight)
        self.reach = config.depth
        self.links = nn.ModuleList(Link(dim, config, norm_eps) for _ in range(config.depth))

    @property
    def _links(self) -> list[Link]:
        return [cast(Link, link) for link in self.links]

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        return tuple(link.init_state(batch, like, capacity) for link in self._links)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None, words: Words | None = None
    ) -> HeadStep:
        if words is None or (words.labels is None and state is None):
            return HeadStep(None, state)
        docs = docs_of(ctx)
        B, T = words.ids.shape
        segments, carried = segments_of(docs, B, T, x.device)
        at = torch.arange(B * T, device=x.device).view(B, T)
        s = Stream(x, words.embed(words.ids).to(x.dtype), at, segments, carried, docs is None)
        found: dict[str, list[Reading]] = {}
        states = []
        for i, (link, (name, out)) in enumerate(zip(self._links, self.readouts.items(), strict=True)):
            s, after = link(s, None if state is None else state[i])
            states.append(after)
            if words.labels is not None:
                targets = shift_targets(words.labels, out.shift, docs).flatten()
                weights = None if words.weights is None else shift_weights(words.weights, out.shift).flatten()
                found[name] = [_reading(link.norm(s.h), s, targets, weights)]
        return HeadStep(None, None if state is None else tuple(states), found)

    def draft(
        self, x: Tensor, state: State | None, words: Words, n: int, pick: Callable[[Tensor], Tensor]
    ) -> Tensor:
        self.check_reach(n)
        if state is None:
            raise ValueError("a chain drafts from a state")
        blank, new = torch.zeros_like(x), words.ids
        segments, carried = segments_of(None, len(new), 1, x.device)
        drafted: list[Tensor] = []
        h, rows = blank, words.embed(new).to(x.dtype)
        for i, link in enumerate(self._links[:n]):
            # What follows the last known item is a blank: only its token is read.
            s, _ = link(Stream(h, rows, torch.zeros_like(segments), segments, carried, True), state[i])
            new = pick(link.norm(s.h[:, -1:]))
            drafted.append(new)
            h = torch.cat([s.h, blank], dim=1)
            rows = torch.cat([s.rows, words.embed(new).to(x.dtype)], dim=1)
            segments = torch.cat([s.segments, carried[:, None]], dim=1)
        return torch.cat(drafted, dim=1) if drafted else words.ids[:, :0]

    def cost(self, T: int, vocab: int) -> HeadCost:
        """Depth k stands at T - k positions of a row."""
        linear, rest, table = 0.0, Cost(), 0.0
        for k, link in enumerate(self._links, 1):
            n = max(T - k, 0)
            linear += linear_flops(link) * n
            rest += link.cost(n)
            table += 2.0 * vocab * self.dim * n
        return HeadCost(linear, rest, table)


def _reading(h: Tensor, s: Stream, targets: Tensor, weights: Tensor | None) -> Reading:
    """What the items that stand in this call say."""
    at = torch.where(s.segments != -1, s.at, -1).flatten()
    here = (at >= 0).nonzero().flatten()
    at = at[here]
    flat = h.flatten(0, 1).index_select(0, here)
    return Reading(flat, targets[at], None if weights is None else weights[at], at)
