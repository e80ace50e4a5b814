"""Summary vectors: every s tokens are put into k vectors, which later tokens read beside a window.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width
              S tokens of a segment (`every`)  N segments that a call finishes  J summary vectors of a segment

The vectors stand to a segment as summary tokens do in AutoCompressors (Chevalier et al., arXiv 2305.14788);
a memory that is recompressed is that of the recurrent memory transformer (arXiv 2207.06881).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.blocks._heads import GroupedHeads
from model.blocks._windows import Windows, finished, make_windows, store, take
from model.core import Cost, Ctx, Docs, Step, at_least_fp32, docs_of, positions_of, rotary_positions
from model.ops.attention import Places, attend
from model.ops.attention.cache import WindowKV, empty_cache, extend
from model.ops.attention.cpu import attention_flops
from model.ops.rope import rope, rope_tables
from model.registry import block

MODES = ("accumulate", "recompress")


class SummaryState(NamedTuple):
    """kv: the last window - 1 keys and values. k, v [B, M, J, G, K]: memory of the row's last document.

    M is fixed: segments of the capacity, or 1 for a memory that is recompressed.
    """

    kv: WindowKV
    k: Tensor
    v: Tensor


class GrowingSummaryState(NamedTuple):
    """The same; M grows by doubling."""

    kv: WindowKV
    k: Tensor
    v: Tensor


@block("summary")
class Summary(GroupedHeads):
    """y = W_o (local + g memory),  g = sigmoid(W_g x) a head; over the query's own document:

      local   attention to the last `window` tokens.
      memory  attention to the summary vectors of finished segments of `every` tokens.

    `vectors` learned queries, turned by RoPE to the segment's end, attend to its tokens' keys and values;
    W_k and W_v of each head make a memory's key (at the segment's end) and value of what they bring back.

    mode:   "accumulate" keeps the vectors of every segment: the memory grows by `vectors` every `every`
            tokens. "recompress" keeps `vectors` in all: the queries attend to the old memory and the segment,
            and what they bring back is the new memory.
    bptt:   for "recompress": the gradient does not pass from one memory to the next at segments whose number
            is a multiple of this; None never cuts. Cuts between calls are the caller's (`core.detach`).
    window: at least `every`; None is `every`.
    head_dim, group, heads, theta: as for `attention`.

    State: `GrowingSummaryState`, or with a capacity or when recompressing, `SummaryState`. Overflow raises.
    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        group: int = 1,
        heads: int | None = None,
        every: int = 64,
        vectors: int = 4,
        mode: Literal["accumulate", "recompress"] = "accumulate",
        bptt: int | None = None,
        window: int | None = None,
        theta: float = 10_000.0,
    ) -> None:
        super().__init__(dim, head_dim, group, heads, theta=theta)
        window = every if window is None else window
        if every < 2 or vectors < 1:
            raise ValueError(f"every={every}, vectors={vectors}: at least 2 tokens and 1 vector")
        if window < every:
            raise ValueError(f"window={window}: must reach over the {every} tokens of an open segment")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        if bptt is not None and (bptt < 1 or mode == "accumulate"):
            raise ValueError(f"bptt={bptt}: segments, at least 1, of a memory that is recompressed")
        self.every, self.vectors, self.window = every, vectors, window
        self.recompress, self.bptt = mode == "recompress", bptt
        self.g_proj = nn.Linear(dim, self.heads, bias=False)
        self.asks = nn.Parameter(torch.randn(vectors, self.kv_heads, head_dim))
        self.memory_k = nn.Parameter(torch.randn(self.kv_heads, head_dim, head_dim) * head_dim**-0.5)
        self.memory_v = nn.Parameter(torch.eye(head_dim).repeat(self.kv_heads, 1, 1))

    def init_state(
        self, batch: int, like: Tensor, capacity: int | None = None
    ) -> SummaryState | GrowingSummaryState:
        G, K = self.kv_heads, self.head_dim
        kv = empty_cache(batch, like, heads=G, widths=(K, K), window=self.window)
        assert isinstance(kv, WindowKV)
        slots = 1 if self.recompress else (capacity or 0) // self.every
        k, v = (like.new_zeros(batch, slots, self.vectors, G, K) for _ in range(2))
        made = GrowingSummaryState if capacity is None and not self.recompress else SummaryState
        return made(kv, k, v)

    def forward(
        self, x: Tensor, state: SummaryState | GrowingSummaryState | None = None, ctx: Ctx | None = None
    ) -> Step:
        docs, seen = docs_of(ctx), None if state is None else state.kv.seen
        B, T, _ = x.shape
        q, k, v = self.turned(x, ctx, seen)
        positions = rotary_positions(ctx, seen, B, T, x.device).expand(B, T)
        windows = make_windows(docs, seen, self.every, self.every, B, T, x.device)
        new = self._summaries(k, v, windows, positions, state)
        view, kv = extend(None if state is None else state.kv, k, v, docs)
        local = attend(q, **view._asdict(), window=self.window)
        read = self._read(q, new, windows, docs, state)
        y = local + self.g_proj(x).sigmoid()[..., None] * read
        y = self.o_proj(y.flatten(2))
        if state is None or kv is None:
            return Step(y)
        return Step(y, self._after(state, kv, new, windows))

    # ------------------------------------------------------------------------- memory

    def _summaries(
        self,
        k: Tensor,
        v: Tensor,
        windows: Windows,
        turned: Tensor,
        state: SummaryState | GrowingSummaryState | None,
    ) -> list[Tensor]:
        """Keys and values [B, N, J, G, K] of the segments that this call finishes, in fp32 at least."""
        with torch.autocast(k.device.type, enabled=False):
            wide, S = at_least_fp32(k.dtype), self.every
            parts = []
            for i, new in enumerate((k, v)):
                past = new.new_zeros(len(k), S - 1, *k.shape[2:])
                if state is not None:
                    past = state.kv[i][:, self.window - S :].to(new.dtype)
                parts.append(take(torch.cat([past, new], 1), windows.members).to(wide))  # [B, N, S, G, K]
            end = windows.members[..., -1] - (S - 1)
            cos, sin = rope_tables(take(turned, end), self.head_dim, self.theta, wide)  # [B, N, 1, K/2]
            cos, sin = cos[:, :, None], sin[:, :, None]
            asks = rope(self.asks.to(wide), cos, sin)  # [B, N, J, G, K]
            if not self.recompress:
                return self._made(self._attend(asks, parts[0], parts[1], None), cos, sin)
            return self._recompressed(asks, parts, cos, sin, windows, state)

    def _recompressed(
        self, asks: Tensor, parts: list[Tensor], cos: Tensor, sin: Tensor, windows: Windows,
        state: SummaryState | GrowingSummaryState | None,
    ) -> list[Tensor]:  # fmt: skip
        B, N, J, G, K = asks.shape
        memory = (
            [asks.new_zeros(B, J, G, K)] * 2 if state is None else [t[:, 0].to(asks.dtype) for t in state[1:]]
        )
        made: list[list[Tensor]] = []
        for n in range(N):
            number = windows.number[:, n]
            if self.bptt is not None:
                cut = (number % self.bptt == 0)[:, None, None, None]
                memory = [torch.where(cut, m.detach(), m) for m in memory]
            both = [torch.cat([m, p[:, n]], 1)[:, None] for m, p in zip(memory, parts)]
            there = (number > 0)[:, None] | (torch.arange(both[0].shape[2], device=asks.device) >= J)
            o = self._attend(asks[:, n : n + 1], both[0], both[1], there[:, None])
            made.append(self._made(o, cos[:, n : n + 1], sin[:, n : n + 1]))
            memory = [m[:, 0] for m in made[-1]]
        if not made:
            return [asks.new_zeros(B, 0, J, G, K)] * 2
        return [torch.cat(x, 1) for x in zip(*made)]

    def _attend(self, asks: Tensor, k: Tensor, v: Tensor, there: Tensor | None) -> Tensor:
        """asks [B, N, J, G, K], k, v [B, N, L, G, K], there [B, N, L] -> [B, N, J, G, K]."""
        logits = torch.einsum("bnjgk,bnlgk->bngjl", asks, k) * self.head_dim**-0.5
        if there is not None:
            logits = logits.masked_fill(~there[:, :, None, None], -torch.inf)
        return torch.einsum("bngjl,bnlgk->bnjgk", logits.softmax(-1), v)

    def _made(self, o: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """The memory's keys and values of what the queries brought back."""
        k, v = (torch.einsum("bnjgk,gkl->bnjgl", o, w.to(o.dtype)) for w in (self.memory_k, self.memory_v))
        return [rope(k, cos, sin), v]

    def _read(
        self, q: Tensor, new: list[Tensor], windows: Windows, docs: Docs | None,
        state: SummaryState | GrowingSummaryState | None,
    ) -> Tensor:  # fmt: skip
        """[B, T, H, K]: places are numbers of segments, so the newest memory is a window of one."""
        B, T = q.shape[:2]
        k, v = (t.to(q.dtype) for t in new)
        number, segments = windows.number, windows.at.segments
        if state is not None:
            k, v = (torch.cat([o.to(q.dtype), n], 1) for o, n in zip(state[1:], (k, v)))
            slot = torch.arange(state.k.shape[1], device=q.device).expand(B, -1)
            if self.recompress:
                slot = (windows.before - 1)[:, None]
            held = (slot >= 0) & (slot < windows.before[:, None])
            number = torch.cat([slot, number], 1)
            segments = torch.cat([torch.where(held, windows.carried[:, None], -1), segments], 1)
        if k.shape[1] == 0 or T == 0:
            return torch.zeros_like(q)
        positions = positions_of(docs, None if state is None else state.kv.seen, B, T, q.device).expand(B, T)
        mine = torch.zeros_like(positions) if docs is None else docs.segments
        at = Places(finished(positions + 1, self.every, self.every), mine)
        key_at = Places(*(t.repeat_interleave(self.vectors, 1) for t in (number + 1, segments)))
        window = 1 if self.recompress else None
        return attend(q, k.flatten(1, 2), v.flatten(1, 2), at=at, key_at=key_at, window=window)

    def _after(
        self, state: SummaryState | GrowingSummaryState, kv: WindowKV, new: list[Tensor], windows: Windows
    ) -> SummaryState | GrowingSummaryState:
        made, slots = type(state), state.k.shape[1]
        if self.recompress:
            return made._make([kv, *(_newest(o, n, windows) for o, n in zip(state[1:], new))])
        most = int(windows.after.max()) if windows.after.numel() else 0
        if made is GrowingSummaryState:
            slots = 1 << (most - 1).bit_length() if most else 0
        elif most > slots:
            raise OverflowError(
                f"the memory holds the summaries of {slots} segments of {self.every} tokens and would need "
                f"{most}: pass a larger `capacity` to init_state, or None to let it grow"
            )
        return made._make([kv, *(store(o, n, windows, slots) for o, n in zip(state[1:], new))])

    def cost(self, T: int) -> Cost:
        """FLOPs of the window, of the summaries and of reading them. Summaries of an unfinished segment are
        not there, which `state_fixed` makes up for."""
        G, K, J, S = self.kv_heads, self.head_dim, self.vectors, self.every
        N = T // S
        made = 4 * J * G * K * (S + J * self.recompress) + 4 * J * G * K * K
        flops = attention_flops(T, self.heads, K, self.window) + N * made + 4 * self.heads * K * T * N * J
        token = 2.0 * G * K * self.k_proj.weight.element_size()
        fixed = 8.0 + (self.window - 1) * token
        if self.recompress:
            return Cost(float(flops), state_fixed=fixed + J * token)
        return Cost(float(flops), fixed + N * J * token - T * (J * token / S), J * token / S)


def _newest(old: Tensor, new: Tensor, windows: Windows) -> Tensor:
    """[B, 1, J, G, K]: the memory after the row's last finished segment; 0 if its last document has none."""
    count = (windows.at.segments >= 0).sum(1)
    kept = torch.where(windows.goes_on, windows.before, 0)
    made = windows.after - kept
    both = torch.cat([old, new.to(old.dtype)], 1)
    index = torch.where(made > 0, count, 0)
    held = (windows.after > 0)[:, None, None, None]
    return torch.where(held, both[torch.arange(len(both), device=old.device), index], 0)[:, None]
