"""Native sparse attention (NSA, Yuan et al., arXiv 2502.11089): pooled blocks, selected blocks, a window.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width
              L tokens of a pooled key  C pooled keys
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.blocks._heads import GroupedHeads
from model.blocks._windows import Windows, make_windows, newest, places_seen, store, take
from model.core import Cost, Ctx, Docs, State, Step, docs_of
from model.ops.attention import Places, attend
from model.ops.attention.cache import FixedKV, GrowingKV, View, empty_cache, extend
from model.ops.attention.cpu import attention_flops
from model.ops.attention.places import resolve
from model.ops.nsa import Grid, Pooled, nsa, nsa_flops
from model.ops.select import known_backend
from model.registry import block


class NSAState(NamedTuple):
    """kv: keys and values of each row's last document. k, v [B, C, G, K]: its finished pooled blocks."""

    kv: GrowingKV | FixedKV
    k: Tensor
    v: Tensor


@block("compressed_attn")
class CompressedAttention(GroupedHeads):
    """y = W_o (g_1 pooled + g_2 selected + g_3 window),  g = sigmoid(W_g x), three gates a head

    over the query's own document, up to the query:
      pooled    attention to one key and value per block: the mean of `pool` tokens every `stride`, under
                learned weights a place, which start equal. A block is read once it is complete.
      selected  attention to the tokens of `count` blocks of `block` tokens: the first, the query's own, the
                one before it, and those to which the pooled branch gave most weight.
      window    attention to the last `window` tokens.
    The three share keys and values, and a group of query heads shares its selection.

    head_dim, group, heads, theta: as for `attention`.    backend: of `model.ops.nsa`.

    It saves work, not memory. State: `NSAState`; with a capacity its sizes are fixed, and overflow raises.
    Raises ValueError for widths that do not divide, or sizes that do not fit each other.
    """

    no_decay = ("pool_logits",)

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        group: int = 1,
        heads: int | None = None,
        pool: int = 32,
        stride: int = 16,
        block: int = 64,
        count: int = 16,
        window: int = 512,
        theta: float = 10_000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, head_dim, group, heads, theta=theta)
        if window < 1:
            raise ValueError(f"window={window}: tokens, at least 1")
        self.grid = Grid(pool, stride, block, count)
        self.grid.check()
        self.window, self.backend = window, known_backend("nsa", backend)
        self.g_proj = nn.Linear(dim, 3 * self.heads, bias=False)
        self.pool_logits = nn.Parameter(torch.zeros(2, self.kv_heads, pool))  # of keys, of values

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> NSAState:
        widths = self.head_dim, self.head_dim
        kv = empty_cache(batch, like, heads=self.kv_heads, widths=widths, capacity=capacity)
        assert isinstance(kv, GrowingKV | FixedKV)
        slots = (capacity or 0) // self.grid.stride
        k, v = (like.new_zeros(batch, slots, self.kv_heads, self.head_dim) for _ in range(2))
        return NSAState(kv, k, v)

    def forward(self, x: Tensor, state: NSAState | None = None, ctx: Ctx | None = None) -> Step:
        docs, seen = docs_of(ctx), None if state is None else state.kv.seen
        B, T, _ = x.shape
        q, k, v = self.turned(x, ctx, seen)
        grid = self.grid
        windows = make_windows(docs, seen, grid.pool, grid.stride, B, T, x.device)
        new = [self._pool(t, i, windows, state) for i, t in enumerate((k, v))]
        past: State = None if state is None else state.kv
        view, kv = extend(past, k, v, docs)
        at, key_at = resolve(q, view.k, view.docs, view.at, view.key_at)
        near, far = nsa(
            q, view.k, view.v, self._pooled(new, windows, state), grid=grid, at=at, key_at=key_at,
            base=_base(view, docs, at), backend=self.backend,
        )  # fmt: skip
        local = self._local(q, view, docs, seen, at)
        gates = self.g_proj(x).sigmoid().unflatten(-1, (self.heads, 3))[..., None]
        y = gates[..., 0, :] * near + gates[..., 1, :] * far + gates[..., 2, :] * local
        y = self.o_proj(y.flatten(2))
        if state is None or kv is None:
            return Step(y)
        slots = kv.k.shape[1] // grid.stride
        return Step(y, NSAState._make([kv, *(store(o, n, windows, slots) for o, n in zip(state[1:], new))]))

    def _pool(self, tokens: Tensor, which: int, windows: Windows, state: NSAState | None) -> Tensor:
        """tokens [B, T, G, K] -> [B, N, G, K]: the blocks that this call finishes."""
        L = self.grid.pool
        if state is None:
            past = tokens.new_zeros(tokens.shape[0], L - 1, *tokens.shape[2:])
        else:
            past = newest(state.kv[which], state.kv.seen, L - 1).to(tokens.dtype)
        members = take(torch.cat([past, tokens], 1), windows.members)  # [B, N, L, G, K]
        weights = self.pool_logits[which].softmax(-1).to(tokens.dtype)
        return (members * weights.T[..., None]).sum(2)

    def _pooled(self, new: list[Tensor], windows: Windows, state: NSAState | None) -> Pooled:
        slots = 0 if state is None else state.k.shape[1]
        number, at = places_seen(windows, slots, self.grid.pool, self.grid.stride)
        if state is not None:
            new = [torch.cat([o.to(n.dtype), n], 1) for o, n in zip(state[1:], new)]
        return Pooled(new[0], new[1], at, number)

    def _local(self, q: Tensor, view: View, docs: Docs | None, seen: Tensor | None, at: Places) -> Tensor:
        """The window branch; behind a cache only the tokens in reach are looked at."""
        T, W = q.shape[1], self.window
        if docs is not None or view.at is None or seen is None or view.k.shape[1] <= W + T:
            return attend(q, **view._asdict(), window=W)
        k, v = (newest(t, seen + T, W - 1 + T) for t in (view.k, view.v))
        place = seen[:, None] + torch.arange(1 - W, T, device=q.device)
        key_at = Places(place, torch.where(place >= 0, 0, -1))
        return attend(q, k, v, at=at, key_at=key_at, window=W, span=W)

    def cost(self, T: int) -> Cost:
        """FLOPs of the three branches, masked products included. There is room for whole strides only, which
        `state_fixed` makes up for."""
        grid, G, K = self.grid, self.kv_heads, self.head_dim
        flops = nsa_flops(T, self.heads, K, grid) + attention_flops(T, self.heads, K, self.window)
        token = 2.0 * G * K * self.k_proj.weight.element_size()
        missing = T // grid.stride - T / grid.stride
        return Cost(flops, 8.0 + missing * token, token + token / grid.stride)


def _base(view: View, docs: Docs | None, at: Places) -> Tensor | None:
    """[B, T] index of the first key of each query's document, where its keys stand in order."""
    if view.at is not None:
        return torch.zeros_like(at.positions) if docs is None else None
    return torch.arange(at.positions.shape[1], device=at.positions.device) - at.positions
