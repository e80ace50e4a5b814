"""YOCO's one memory and the attention that reads it (Sun et al., arXiv 2405.05254).

Shape legend: B batch  T time  S keys in reach  D model width  H query heads  G key/value heads  K head width

The memory is written once, from what the self half made; every `xattn` of the cross half reads it, with
queries of its own and nothing else. So the only cache that grows with the context is that of one layer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from model.blocks._gate import gated, head_gate
from model.core import Block, Cost, Ctx, Docs, Memory, State, Step, docs_of, rotary_positions
from model.ops.attention import Places, attend
from model.ops.attention.cache import empty_cache, extend
from model.ops.attention.cpu import attention_flops
from model.ops.norm import RMSNorm
from model.ops.rope import rope, rope_tables
from model.registry import block


class KVMemory(nn.Module):
    """x [B, T, D] -> k, v = W_k rms(x), W_v rms(x), the keys rotated: what a cross half reads.

    heads: G; None is D / K.     position, theta: as for the block `attention`.
    State: the keys and values of each row's last document, `GrowingKV` or, with a capacity, `FixedKV`.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        heads: int | None = None,
        position: Literal["rope", "none"] = "rope",
        theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads or dim // head_dim, head_dim
        self.position, self.theta = position, theta
        self.norm = RMSNorm(dim)
        self.k_proj = nn.Linear(dim, self.heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.heads * head_dim, bias=False)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        widths = self.head_dim, self.head_dim
        return empty_cache(batch, like, heads=self.heads, widths=widths, capacity=capacity)

    def forward(
        self, x: Tensor, state: State | None = None, ctx: Ctx | None = None
    ) -> tuple[Memory, State | None]:
        """The memory that this call's queries see, and the state after the call."""
        docs = docs_of(ctx)
        h = self.norm(x)
        k, v = (p(h).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        turn = None
        if self.position == "rope":
            seen = None if state is None else state.seen
            rows = 1 if docs is None and seen is None else x.shape[0]
            positions = rotary_positions(ctx, seen, rows, x.shape[1], x.device)
            turn = rope_tables(positions, self.head_dim, self.theta, x.dtype)
            k = rope(k, *turn)
        view, after = extend(state, k, v, docs)
        docs = None if view.docs is None else docs
        return Memory(view.k, view.v, docs, view.at, view.key_at, turn), after

    def cost(self, T: int) -> Cost:
        token = 2.0 * self.heads * self.head_dim * self.k_proj.weight.element_size()
        return Cost(state_fixed=8.0, state_per_token=token)  # fixed: the count of tokens


@block("xattn")
class CrossAttention(Block):
    """y = W_o softmax(q k' / sqrt(K)) v over the memory of the enclosing yoco, up to the query's own token.

    head_dim: K, the memory's; None takes that, or outside a plan the largest that divides 64 and the width.
    heads:    H, a multiple of the memory's G; None is dim / head_dim.
    sinks:    one learned logit per head that joins every softmax and carries no value.
    gate:     as for the block `attention`.

    No state: the memory has it.
    Raises ValueError without a memory, or when its heads do not fit.
    """

    reads_memory = True

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        heads: int | None = None,
        sinks: bool = False,
        gate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        head_dim = head_dim or math.gcd(dim, 64)
        if heads is None and dim % head_dim:
            raise ValueError(f"dim={dim} is not a multiple of head_dim={head_dim}: change one, or set heads")
        self.head_dim, self.heads, self.backend = head_dim, heads or dim // head_dim, backend
        self.q_proj = nn.Linear(dim, self.heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * head_dim, dim, bias=False)
        self.o_proj.residual_out = True  # type: ignore[assignment]
        self.row_groups = {"q_proj.weight": self.heads}
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if sinks else None
        self.head_gate = head_gate(gate, dim, self.heads)

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        memory = None if ctx is None else ctx.memory
        if memory is None:
            raise ValueError("xattn reads the memory of a yoco, and there is none: put it in a `cross` half")
        G, K = memory.k.shape[2:]
        if self.head_dim != K or self.heads % G:
            raise ValueError(f"xattn: {self.heads} heads of {self.head_dim} cannot read {G} of {K}")
        q = self.q_proj(x).unflatten(-1, (-1, K))
        if memory.turn is not None:
            q = rope(q, *memory.turn)
        k, v, docs, at, key_at, _ = memory
        y = attend(
            q, k.to(q.dtype), v.to(q.dtype), docs=docs, at=at, key_at=key_at, sinks=self.sinks,
            backend=self.backend,
        )  # fmt: skip
        y, aux = gated(self.head_gate, y.flatten(2), x, ctx)
        return Step(self.o_proj(y), state, aux)

    def cost(self, T: int) -> Cost:
        """FLOPs of the products over a memory of the same T tokens, those under the mask included."""
        return Cost(flops=attention_flops(T, self.heads, self.head_dim, sinks=self.sinks is not None))


def last_queries(x: Tensor, ctx: Ctx, memory: Memory) -> tuple[Tensor, Ctx]:
    """Only each row's last token that is not padding: x [B, 1, D], and a ctx in which it reads the memory."""
    docs, at = ctx.docs, memory.at
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
