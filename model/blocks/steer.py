"""A feed-forward layer that steers the attention after it: which keys are kept, or how far each head is open.

Shape legend: B batch  T time  D model width  W window  H query heads  G key/value heads  K head width
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.blocks._gate import HeadGate, apply_gates
from model.blocks.swa import SlidingWindowAttention
from model.core import (
    Aux,
    Block,
    Cost,
    Ctx,
    Docs,
    State,
    Step,
    count_tokens,
    docs_of,
    merge_aux,
    positions_of,
)
from model.ops.attention import Places, attend
from model.ops.attention.cpu import attention_flops
from model.ops.norm import RMSNorm
from model.ops.selection import Selector
from model.registry import block, make_block


class KeptKV(NamedTuple):
    """k, v [B, W, G, K] of the last W kept tokens, right-aligned after zeros; kept, seen [B] int64: kept
    tokens and all tokens of the row's document so far."""

    k: Tensor
    v: Tensor
    kept: Tensor
    seen: Tensor


@block("steer")
class Steer(Block):
    """x += mlp(rms(x)), with spare neurons beside it; then x += swa(rms(x)), steered by these.

    how: keys   one spare neuron scores the token: the share `keep` of the tokens are kept as keys. A query
                sees the last `window` kept tokens of its document, up to its own: at equal memory the
                window reaches about 1 / keep as far back. The first token of a document is always kept.
                Values are scaled by sigmoid(score - threshold), which is how the neuron learns; the choice
                is the same in training and after it (`model.ops.selection`).
         gates  H spare neurons: every head of `swa` is scaled by sigmoid(its neuron), 0.98 at first.

    mlp, swa: parameters of these blocks; with `keys`, swa has no ALiBi and no convolutions, whose distances
              and taps are about all tokens.
    keep, decay: see `model.ops.selection`; for `keys` alone.

    State: (that of mlp; that of swa, or with `keys` a `KeptKV`).
    Raises ValueError for what does not go with `keys`, and for an unknown `how`.
    """

    bare = True

    def __init__(
        self,
        dim: int,
        *,
        how: Literal["keys", "gates"] = "keys",
        mlp: dict[str, Any] | None = None,
        swa: dict[str, Any] | None = None,
        keep: float = 0.5,
        decay: float = 0.5,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim)
        if how not in ("keys", "gates"):
            raise ValueError(f"how={how!r}: must be keys or gates")
        self.how = how
        self.norms = nn.ModuleList(RMSNorm(dim, norm_eps) for _ in range(2))
        self.mlp: Block = make_block("mlp", dim, **(mlp or {}))
        self.swa: SlidingWindowAttention = make_block("swa", dim, **(swa or {}))
        if self.swa.head_gate is not None:
            raise ValueError("swa: a gate of its own has no place here; `how: gates` is the one there is")
        if how == "gates":
            self.neurons = HeadGate(dim, self.swa.heads)
        else:
            if self.swa.position == "alibi" or self.swa.conv_weight is not None:
                raise ValueError("how=keys: swa's position must be rope or none, and its conv 0")
            self.select = Selector(dim, keep, decay)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        own = self.mlp.init_state(batch, like, capacity)
        if self.how == "gates":
            return own, self.swa.init_state(batch, like, capacity)
        shape = (batch, self.swa.window or 0, self.swa.kv_heads, self.swa.head_dim)
        counts = (torch.zeros(batch, dtype=torch.int64, device=like.device) for _ in range(2))
        return own, KeptKV(like.new_zeros(shape), like.new_zeros(shape), *counts)

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        own, past = (None, None) if state is None else state
        h = self.norms[0](x)
        spare = self.neurons(h) if self.how == "gates" else self.select(x)
        fed = self.mlp(h, own, ctx)
        x = x + fed.y
        run = self._gated if self.how == "gates" else self._selected
        y, after, aux = run(spare, self.norms[1](x), past, ctx)
        x = x + self.swa.o_proj(y)
        aux = merge_aux([fed.aux.under("mlp"), aux])
        return Step(x, None if state is None else (fed.state, after), aux)

    def _gated(self, logits: Tensor, x: Tensor, past: State, ctx: Ctx | None) -> tuple[Tensor, State, Aux]:
        y, _, after = self.swa.heads_of(x, past, ctx)
        y, aux = apply_gates(logits, y.flatten(2), ctx)
        return y, after, aux

    def _selected(
        self, score: Tensor, x: Tensor, past: KeptKV | None, ctx: Ctx | None
    ) -> tuple[Tensor, KeptKV | None, Aux]:
        """What the heads make of the last W kept tokens: ranks among the kept take the place of positions."""
        swa, docs, (B, T, _) = self.swa, docs_of(ctx), x.shape
        seen = None if past is None else past.seen
        p = swa.project(x, seen, None, ctx)
        tokens = None if docs is None else docs.tokens
        chosen = self.select.choose(score, tokens)
        scale = torch.sigmoid(score - self.select.threshold)
        keys = p.k, p.v * scale.to(p.v.dtype)[..., None, None]
        outer = Docs.whole(B, T, x.device) if docs is None else docs
        first = outer.first_segment() if T else torch.arange(B, device=x.device)
        kept = chosen | ((positions_of(outer, seen, B, T, x.device) == 0) & outer.tokens)
        rank = _ranks(kept, outer) - 1
        if past is not None:
            rank = rank + past.kept[:, None] * (outer.segments == first[:, None])
        key_at = Places(rank, torch.where(kept, outer.segments, -1))
        if past is not None:
            W = past.k.shape[1]
            slot = past.kept[:, None] - W + torch.arange(W, device=x.device)
            held = torch.where(slot >= 0, first[:, None], -1)
            key_at = Places(torch.cat([slot, rank], 1), torch.cat([held, key_at.segments], 1))
            keys = _joined(past, keys)
        y = attend(
            p.q, *keys, at=Places(rank, outer.segments), key_at=key_at, window=swa.window, sinks=swa.sinks,
            backend=swa.backend,
        )  # fmt: skip
        stats = {"kept": chosen.sum() / outer.tokens.sum().clamp_min(1)} if T > 1 else {}
        after = None if past is None else _after(past, keys, key_at, kept, outer, first)
        return y.flatten(2), after, Aux(stats=stats)

    def cost(self, T: int) -> Cost:
        """With `keys`: the products of all T x T pairs, which are made under the mask."""
        swa, own = self.swa, self.mlp.cost(T)
        if self.how == "gates":
            return own + swa.cost(T)
        # `slopes` says that the mask is explicit.
        sinks = swa.sinks is not None
        flops = attention_flops(T, swa.heads, swa.head_dim, sinks=sinks, slopes=True)
        held = 2.0 * (swa.window or 0) * swa.kv_heads * swa.head_dim * swa.k_proj.weight.element_size()
        return own + Cost(float(flops), state_fixed=held + 16)  # and two counts


def _ranks(kept: Tensor, docs: Docs) -> Tensor:
    """[B, T] int64: kept tokens of the token's document up to it, in this call."""
    B, T = kept.shape
    ends = kept.cumsum(1)
    start = torch.arange(T, device=kept.device).expand(B, T) - docs.positions
    return ends - (ends - kept.long()).gather(1, start)


def _joined(past: KeptKV, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The state's keys and values, then new ones, in the dtype of these."""
    k, v = (torch.cat([o.to(n.dtype), n], 1) for o, n in zip(past[:2], new))
    return k, v


def _after(
    past: KeptKV, keys: tuple[Tensor, Tensor], at: Places, kept: Tensor, docs: Docs, first: Tensor
) -> KeptKV:
    """The last W kept tokens of each row's last document, right-aligned."""
    (B, T), W = kept.shape, past.k.shape[1]
    last = docs.last_segment()
    last = torch.where(last == -2, first, last)  # a row without tokens goes on with its document
    total = ((docs.segments == last[:, None]) & kept).sum(1) + past.kept * (last == first)
    slot = at.positions - (total[:, None] - W)
    slot = torch.where((at.segments == last[:, None]) & (slot >= 0), slot, W)[:, :, None, None]
    k, v = (
        t.new_zeros(B, W + 1, *t.shape[2:]).scatter(1, slot.expand_as(t), t)[:, :W].to(o.dtype, copy=True)
        for t, o in zip(keys, past[:2])
    )
    return KeptKV(k.contiguous(), v.contiguous(), total, count_tokens(docs, past.seen, B, T, kept.device))
