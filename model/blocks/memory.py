"""The memory of a yoco (Sun et al., arXiv 2405.05254): keys and values written once, from what the self half
made, and read by every `xattn` and `recall` of the cross half.

Shape legend: B batch  T time  C slots of the state  S keys in reach  D model width  G heads  K head width

    KVMemory        every token, or with `ring` the last so many: a state that grows by one layer's keys and
                    values a token, or one that does not grow
    SelectedMemory  the tokens that a learned score keeps, and the last `recent` (`memory: {keep: ...}`)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.core import (
    NO_AUX,
    Aux,
    Cost,
    Ctx,
    Docs,
    Memory,
    State,
    count_tokens,
    docs_of,
    positions_of,
    rotary_positions,
)
from model.ops.attention import Places
from model.ops.attention.cache import doubled, empty_cache, extend
from model.ops.norm import RMSNorm
from model.ops.rope import rope, rope_tables
from model.ops.selection import Selector

FOREVER = 1 << 62  # positions
Held = tuple[Tensor, Tensor, Tensor, Tensor]  # k, v, position, kept: see GrowingTokens


class KVMemory(nn.Module):
    """x [B, T, D] -> k, v = W_k rms(x), W_v rms(x), the keys rotated: what a cross half reads.

    heads: G; None is D / K.     position, theta: as for the block `attention`.
    ring:  a query sees the last so many tokens, its own included; None is all of them.

    State: the keys and values of each row's last document: `GrowingKV`; with a capacity `FixedKV`; with
    `ring` `WindowKV`.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        heads: int | None = None,
        position: Literal["rope", "none"] = "rope",
        theta: float = 10_000.0,
        ring: int | None = None,
    ) -> None:
        super().__init__()
        if ring is not None and ring < 1:
            raise ValueError(f"ring={ring}: a query sees at least its own token")
        self.heads, self.head_dim = heads or dim // head_dim, head_dim
        self.position, self.theta, self.ring = position, theta, ring
        self.norm = RMSNorm(dim)
        self.k_proj = nn.Linear(dim, self.heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.heads * head_dim, bias=False)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        widths = self.head_dim, self.head_dim
        return empty_cache(batch, like, heads=self.heads, widths=widths, window=self.ring, capacity=capacity)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None
    ) -> tuple[Memory, State | None, Aux]:
        """The memory that this call's queries see, the state after the call, and by-products."""
        docs = docs_of(ctx)
        k, v, turn = self.keys(x, None if state is None else state.seen, ctx)
        view, after = extend(state, k, v, docs)
        docs = None if view.docs is None else docs
        return Memory(view.k, view.v, docs, view.at, view.key_at, turn, view.span), after, NO_AUX

    def keys(
        self, x: Tensor, seen: Tensor | None, ctx: Ctx | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """k, v [B, T, G, K], and what turned k and is to turn the queries."""
        h = self.norm(x)
        k, v = (p(h).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        if self.position != "rope":
            return k, v, None
        rows = 1 if docs_of(ctx) is None and seen is None else x.shape[0]
        positions = rotary_positions(ctx, seen, rows, x.shape[1], x.device)
        turn = rope_tables(positions, self.head_dim, self.theta, x.dtype)
        return rope(k, *turn), v, turn

    @property
    def notes(self) -> tuple[str, ...]:
        """What a description says."""
        return () if self.ring is None else (f"the last {self.ring} tokens",)

    def token_bytes(self) -> float:
        """Bytes of one token's keys and values."""
        return 2.0 * self.heads * self.head_dim * self.k_proj.weight.element_size()

    def cost(self, T: int) -> Cost:
        fixed = 8.0  # the count of tokens
        if self.ring is not None:
            return Cost(state_fixed=fixed + (self.ring - 1) * self.token_bytes())
        return Cost(state_fixed=fixed, state_per_token=self.token_bytes())


class GrowingTokens(NamedTuple):
    """k, v [B, C, G, K] of the tokens held, in order, then empty slots; position [B, C] int64 in the
    document, -1 in an empty slot; kept [B, C] bool: for ever; seen [B] int64: tokens of it so far."""

    k: Tensor
    v: Tensor
    position: Tensor
    kept: Tensor
    seen: Tensor


class FixedTokens(NamedTuple):
    """As GrowingTokens with C fixed; more tokens held than that raise OverflowError."""

    k: Tensor
    v: Tensor
    position: Tensor
    kept: Tensor
    seen: Tensor


Tokens = GrowingTokens | FixedTokens


class SelectedMemory(KVMemory):
    """A memory that drops tokens for good: a query sees the tokens that were kept, the first of its document,
    and the last `recent` ones, its own included. They stay at their original positions.

    A token is kept by its own score (`model.ops.selection`), the share `ratio` of them on average; its values
    are scaled by sigmoid(score - threshold), which is how the score learns: also from dropped tokens, while
    they are recent. The choice is the same in training and after it. Dynamic memory compression
    (arXiv 2403.09636) merges where this drops.

    State: `GrowingTokens`, by doubling with the tokens that are held, or with a capacity, which is the number
    of slots, `FixedTokens`.
    Raises OverflowError when they are full, ValueError for recent < 1 and what `Selector` refuses.
    """

    def __init__(
        self, dim: int, *, ratio: float = 0.25, recent: int = 128, decay: float = 0.5, **memory: Any
    ) -> None:
        super().__init__(dim, **memory)
        if recent < 1:
            raise ValueError(f"recent={recent}: a query sees at least its own token")
        self.ratio, self.recent = ratio, recent
        self.select = Selector(dim, ratio, decay)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> Tokens:
        shape, device = (batch, capacity or 0), like.device
        kind = GrowingTokens if capacity is None else FixedTokens
        return kind(
            like.new_zeros(*shape, self.heads, self.head_dim),
            like.new_zeros(*shape, self.heads, self.head_dim),
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def forward(
        self, x: Tensor, state: Tokens | None = None, ctx: Ctx | None = None
    ) -> tuple[Memory, State | None, Aux]:
        """As `KVMemory.forward`. Statistics: `kept`, the share of tokens that are kept."""
        B, T, _ = x.shape
        docs, seen = docs_of(ctx), None if state is None else state.seen
        k, v, turn = self.keys(x, seen, ctx)
        score = self.select(x)
        tokens = None if docs is None else docs.tokens
        chosen = self.select.choose(score, tokens)
        v = v * torch.sigmoid(score - self.select.threshold).to(v.dtype)[..., None, None]
        position = positions_of(docs, seen, B, T, x.device).expand(B, T)
        segment = torch.zeros_like(position) if docs is None else docs.segments
        kept = chosen | ((position == 0) & (segment >= 0))
        held, key_segment = (k, v, position, kept), segment
        if state is not None:
            first = position.new_zeros(B) if docs is None else docs.first_segment()
            past = torch.where(state.position >= 0, first[:, None], -1)
            key_segment = torch.cat([past, segment], 1)
            held = _joined(state, held)
        lifetime = torch.where(held[3], FOREVER, self.recent)
        key_at = Places(held[2], key_segment)
        memory = Memory(held[0], held[1], None, Places(position, segment), key_at, turn, lifetime=lifetime)
        after = None if state is None else self._after(state, held, key_segment, docs, T)
        stats = {"kept": _share(chosen, tokens)} if T > 1 else {}
        return memory, after, Aux(stats=stats)

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"keeps {self.ratio:.0%} of the tokens, and the last {self.recent}",)

    def _after(self, state: Tokens, held: Held, segment: Tensor, docs: Docs | None, T: int) -> Tokens:
        """What later queries may still see of each row's last document."""
        seen = count_tokens(docs, state.seen, segment.shape[0], T, segment.device)
        last = torch.zeros_like(seen) if docs is None else docs.last_segment()
        if docs is not None:  # a row of padding alone goes on with its document
            last = torch.where(last == -2, docs.first_segment(), last)
        _, _, position, kept = held
        stay = (
            (segment == last[:, None]) & (position >= 0) & (kept | (position > seen[:, None] - self.recent))
        )
        count = stay.sum(1)
        slots = state.position.shape[1]
        if torch.compiler.is_compiling() and isinstance(state, FixedTokens):
            torch._assert_async((count <= slots).all(), f"the memory of capacity {slots} is full")
        else:
            most = int(count.max()) if len(count) else 0
            slots = doubled(most) if isinstance(state, GrowingTokens) else slots
            if most > slots:
                raise OverflowError(
                    f"the memory holds {slots} tokens and would need {most}: pass a larger `capacity` to"
                    " init_state, or None to let it grow"
                )
        k, v, position, kept = (_packed(t, stay, slots, fill) for t, fill in zip(held, (0, 0, -1, False)))
        return type(state)(k.to(state.k.dtype), v.to(state.v.dtype), position, kept, seen)

    def cost(self, T: int) -> Cost:
        """State bytes as expected: the share `ratio` of the tokens, and what else is recent."""
        token = self.token_bytes() + 9.0  # a position and a flag
        fixed = 8.0 + (1 - self.ratio) * (self.recent - 1) * token
        return Cost(state_fixed=fixed, state_per_token=self.ratio * token)


def make_memory(dim: int, *, keep: dict[str, Any] | None = None, **params: Any) -> KVMemory:
    """The memory of a plan: keep: parameters of `SelectedMemory`, or None for every token."""
    return KVMemory(dim, **params) if keep is None else SelectedMemory(dim, **keep, **params)


def _joined(state: Tokens, new: Held) -> Held:
    """What a state holds, then new tokens, in the dtypes of these."""
    k, v, position, kept = (torch.cat([o.to(n.dtype), n], 1) for o, n in zip(state, new))
    return k, v, position, kept


def _packed(x: Tensor, stay: Tensor, slots: int, empty: float) -> Tensor:
    """x [B, S, ...] where stay [B, S], in order from the left, then `empty` -> [B, slots, ...]."""
    order = (~stay).to(torch.int8).argsort(dim=1, stable=True)[:, :slots]
    there = torch.arange(order.shape[1], device=x.device) < stay.sum(1, keepdim=True)
    index, there = (t.view(*t.shape, *[1] * (x.dim() - 2)) for t in (order, there))
    y = x.gather(1, index.expand(*order.shape, *x.shape[2:])).masked_fill(~there, empty)
    return torch.cat([y, y.new_full((x.shape[0], slots - order.shape[1], *x.shape[2:]), empty)], 1)


def _share(chosen: Tensor, tokens: Tensor | None) -> Tensor:
    return chosen.sum() / (chosen.numel() if tokens is None else tokens.sum().clamp_min(1))


def last_queries(x: Tensor, ctx: Ctx, memory: Memory) -> tuple[Tensor, Ctx]:
    """Only each row's last token that is not padding: x [B, 1, D], and a ctx in which it reads the memory."""
    docs, at = ctx.docs, memory.at
    memory = memory._replace(span=None)  # which is about queries that are as many as the newest keys
    if docs is None:
        if at is not None:
            at = Places(*(p[:, -1:] for p in at))
        turn = None if memory.turn is None else (memory.turn[0][:, -1:], memory.turn[1][:, -1:])
        return x[:, -1:], Ctx(None, memory._replace(at=at, turn=turn), ctx.progress)
    index = docs.last_places()

    def pick(t: Tensor) -> Tensor:
        at = index.view(-1, *[1] * (t.dim() - 1))
        return t.expand(len(index), *t.shape[1:]).gather(1, at.expand(-1, 1, *t.shape[2:]))

    at = Places.of(docs) if at is None else at
    key_at = Places.of(docs) if memory.key_at is None else memory.key_at
    turn = None if memory.turn is None else (pick(memory.turn[0]), pick(memory.turn[1]))
    memory = memory._replace(docs=None, at=Places(*map(pick, at)), key_at=key_at, turn=turn)
    one = Docs.from_segments(pick(docs.segments), pick(docs.positions))
    return pick(x), Ctx(one, memory, ctx.progress)
