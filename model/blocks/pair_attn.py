"""Attention over a window of tokens and a memory of merged pairs, some of which each query opens.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width  P pairs  C slots
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.blocks._heads import GroupedHeads
from model.core import Cost, Ctx, Docs, State, Step, docs_of, fork, rotary_positions
from model.ops.attention.cache import Cache, FixedKV, doubled, empty_cache, extend
from model.ops.attention.places import Places, resolve
from model.ops.pairs import PairMerge, attend_pairs, compact, selected_count
from model.ops.shift import last_token, token_before
from model.registry import block


class PairState(NamedTuple):
    """kv: every token of each row's last document.  k, v [B, C, G, K]: its merged pairs, half as many, pair i
    in slot i, 0 where there is none.  last [B, D]: its newest input, which may be the first of a pair."""

    kv: Cache
    k: Tensor
    v: Tensor
    last: Tensor


class Pairs(NamedTuple):
    """Pairs in order, those of a state first: k, v [B, P, G, K], where their second tokens stand (segment -1:
    no pair), and which there are [B, P]."""

    k: Tensor
    v: Tensor
    ends: Places
    there: Tensor


@block("pair_attn")
class PairAttention(GroupedHeads):
    """Softmax attention in which what lies before the window is seen two tokens at a time.

    Tokens (2i, 2i+1) of a document make one key and one value, from W_k and W_v of their merged input
    (`model.ops.pairs.PairMerge`). A query sees the last `window` tokens (one more if the rest would be odd),
    and of the P pairs before them min(floor(r P + M (1 - r) / 2), P), the ones to which it pays most
    attention, as their two tokens, and the others merged. r = 1, M >= T or window >= T: plain attention.

    head_dim, group, heads, theta: as for `attention`.
    window: W, tokens never merged.  r: share of pairs that a query opens.  M: memory tokens left alone.
    hidden: width of the merge's SwiGLU; None is D / 2.

    State: `PairState`, 1.5 times that of attention: any pair may be opened later.
    Cost: O(T^2) as attention, with T/2 more keys; what shrinks is what a query attends to.
    Raises ValueError for sizes that do not divide, window or hidden < 1, r outside [0, 1] and M < 0.
    """

    no_decay = ("merge.positions",)

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        group: int = 1,
        heads: int | None = None,
        window: int = 128,
        r: float = 0.25,
        M: int = 0,
        hidden: int | None = None,
        theta: float = 10_000.0,
    ) -> None:
        super().__init__(dim, head_dim, group, heads, theta=theta)
        if window < 1:
            raise ValueError(f"window={window}: tokens, at least 1")
        hidden = max(1, dim // 2) if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: width of the merge's SwiGLU, at least 1")
        selected_count(torch.zeros(1, dtype=torch.int64), r, M)
        self.window, self.r, self.M = window, r, M
        self.merge = PairMerge(dim, hidden)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> PairState:
        widths = self.head_dim, self.head_dim
        kv = empty_cache(batch, like, heads=self.kv_heads, widths=widths, capacity=capacity)
        k, v = (like.new_zeros(batch, (capacity or 0) // 2, self.kv_heads, self.head_dim) for _ in range(2))
        return PairState(kv, k, v, like.new_zeros(batch, self.dim))

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        B, T = x.shape[:2]
        if T == 0:
            return Step(x, None if state is None else fork(state))
        docs, kv = docs_of(ctx), None if state is None else state.kv
        seen = None if kv is None else kv.seen
        places = rotary_positions(ctx, seen, B, T, x.device)
        q = self.turn(self.split(self.q_proj, x), places)
        k, v = self._keys(x, places)
        view, after = extend(kv, k, v, docs)
        at, key_at = resolve(q, view.k, view.docs, view.at, view.key_at)
        pairs = self._pairs(x, places, at, state, seen, docs)
        y = attend_pairs(
            q, view.k, view.v, at, key_at, pairs.k, pairs.v, pairs.ends,
            window=self.window, r=self.r, M=self.M,
        )  # fmt: skip
        kept = None
        if state is not None and after is not None:
            kept = PairState(after, *self._kept(pairs, after, state, docs), last_token(x, state.last, docs))
        return Step(self.o_proj(y.flatten(2)), kept)

    def _keys(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> keys, rotated to places [B, T], and values, both [B, T, G, K]."""
        return self.turn(self.split(self.k_proj, x), places), self.split(self.v_proj, x)

    def _pairs(
        self, x: Tensor, places: Tensor, at: Places, state: PairState | None, seen: Tensor | None,
        docs: Docs | None,
    ) -> Pairs:  # fmt: skip
        """Merged pairs of this call behind those of the state.
        A pair's key stands where its second token does."""
        B, D = x.shape[0], x.shape[2]
        index, new = compact((at.positions % 2 == 1) & (at.segments >= 0))
        before = token_before(x, None if state is None else state.last, docs)
        two = torch.stack([t.gather(1, index[..., None].expand(-1, -1, D)) for t in (before, x)], 2)
        k, v = self._keys(self.merge.merge(two), places.expand(B, -1).gather(1, index))
        ends = Places(at.positions.gather(1, index), torch.where(new, at.segments.gather(1, index), -1))
        if state is None or seen is None or state.k.shape[1] == 0:
            return Pairs(k, v, ends, new)
        slot = torch.arange(state.k.shape[1], device=x.device).expand(B, -1)
        held = slot < (seen // 2)[:, None]
        first = slot.new_zeros(B) if docs is None else docs.first_segment()
        old = Places(2 * slot + 1, torch.where(held, first[:, None], -1))
        order, there = compact(torch.cat([held, new], 1))
        ends = Places(*(torch.cat(pair, 1).gather(1, order) for pair in zip(old, ends)))
        where = order[:, :, None, None].expand(-1, -1, *k.shape[2:])
        k = torch.cat([state.k.to(k.dtype), k], 1).gather(1, where)
        v = torch.cat([state.v.to(v.dtype), v], 1).gather(1, where)
        return Pairs(k, v, Places(ends.positions, torch.where(there, ends.segments, -1)), there)

    def _kept(self, pairs: Pairs, after: Cache, state: PairState, docs: Docs | None) -> tuple[Tensor, Tensor]:
        """The pairs of each row's last document, in slots from 0."""
        count = after.seen // 2
        slots = state.k.shape[1]
        if not isinstance(after, FixedKV):
            slots = doubled(int(count.max()) if count.numel() else 0)
        last = count.new_zeros(count.shape) if docs is None else docs.last_segment()
        mine = pairs.there & (pairs.ends.segments == last[:, None])
        if not pairs.k.shape[1]:
            return tuple(t.new_zeros(t.shape[0], slots, *t.shape[2:]) for t in (state.k, state.v))  # type: ignore[return-value]
        slot = torch.arange(slots, device=count.device)
        held = slot < count[:, None]
        source = (mine.int().argmax(1)[:, None] + slot).clamp_max(pairs.k.shape[1] - 1)
        where = source[:, :, None, None].expand(-1, -1, *pairs.k.shape[2:])
        return tuple(
            (new.gather(1, where) * held[:, :, None, None]).to(old.dtype)
            for new, old in ((pairs.k, state.k), (pairs.v, state.v))
        )  # type: ignore[return-value]

    def cost(self, T: int) -> Cost:
        """Products of SDPA over T + P keys, the choice's T x P, W_k and W_v of P merged inputs; the merge's
        own maps, which are counted as if for every token, run on P alone."""
        P, H, K = T // 2, self.heads, self.head_dim
        flops = 4.0 * H * K * T * (T + P)
        if self.r or self.M:
            flops += 2.0 * H * K * T * P
        again = self.k_proj.weight.numel() + self.v_proj.weight.numel()
        merging = sum(m.weight.numel() for m in (self.merge.gate, self.merge.up, self.merge.down))
        flops += 2.0 * P * again - 2.0 * (T - P) * merging
        size = self.k_proj.weight.element_size()
        token = 2.0 * self.kv_heads * K * size  # an odd token is in no pair
        return Cost(flops, 8.0 + self.dim * size - (T % 2) * token / 2, 1.5 * token)
