"""Attention that reads the memory of a yoco (Sun et al., arXiv 2405.05254), which `blocks.memory` writes.

Shape legend: B batch  T time  S keys in reach  D model width  H query heads  G key/value heads  K head width

It has queries of its own and nothing else, so the only cache that grows with the context is one layer's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.blocks._gate import gated, head_gate
from model.core import Block, Cost, Ctx, Memory, State, Step
from model.ops.attention import attend
from model.ops.attention.cpu import attention_flops
from model.ops.rope import rope
from model.ops.select import known_backend
from model.registry import block


@block("xattn")
class CrossAttention(Block):
    """y = W_o softmax(q k' / sqrt(K)) v over the memory of the enclosing yoco, up to the query's own token.

    head_dim: K, the memory's; None takes that, or outside a plan the largest that divides 64 and the width.
    heads:    H, a multiple of the memory's G; None is dim / head_dim.
    window:   how many tokens back it reads, its own included; None is all that the memory holds.
    sinks:    one learned logit per head that joins every softmax and carries no value.
    gate:     as for the block `attention`.

    No state: the memory has it.
    Raises ValueError without a memory, or when its heads do not fit.
    """

    reads_memory = "window"  # the parameter that says how far back

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        heads: int | None = None,
        window: int | None = None,
        sinks: bool = False,
        gate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        head_dim = math.gcd(dim, 64) if head_dim is None else head_dim
        if head_dim < 1 or (heads is not None and heads < 1):
            raise ValueError(f"head_dim={head_dim}, heads={heads}: must be at least 1")
        if heads is None and dim % head_dim:
            raise ValueError(f"dim={dim} is not a multiple of head_dim={head_dim}: change one, or set heads")
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a query sees at least its own token")
        self.window, self.backend = window, known_backend("attention", backend)
        self.head_dim, self.heads = head_dim, heads or dim // head_dim
        self.q_proj = nn.Linear(dim, self.heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * head_dim, dim, bias=False)
        self.o_proj.residual_out = True  # type: ignore[assignment]
        self.row_groups = {"q_proj.weight": self.heads}
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if sinks else None
        self.head_gate = head_gate(gate, dim, self.heads)

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        memory = memory_of(ctx, "xattn", self.heads, self.head_dim)
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        y = read_memory(q, memory, window=self.window, sinks=self.sinks, backend=self.backend)
        y, aux = gated(self.head_gate, y.flatten(2), x, ctx)
        return Step(self.o_proj(y), state, aux)

    def cost(self, T: int) -> Cost:
        """FLOPs of the products over a memory of the same T tokens, those under the mask included."""
        sinks = self.sinks is not None
        return Cost(flops=attention_flops(T, self.heads, self.head_dim, self.window, sinks=sinks))


def memory_of(ctx: Ctx | None, name: str, heads: int, head_dim: int) -> Memory:
    """The memory that block `name` stands in. Raises ValueError without one, or when its heads do not fit."""
    memory = None if ctx is None else ctx.memory
    if memory is None:
        raise ValueError(f"{name} reads the memory of a yoco, and there is none: put it in a `cross` half")
    G, K = memory.k.shape[2:]
    if head_dim != K or heads % G:
        raise ValueError(f"{name}: {heads} heads of {head_dim} cannot read {G} of {K}")
    return memory


def read_memory(q: Tensor, memory: Memory, **options: Any) -> Tensor:
    """Attention of q [B, T, H, K], not yet rotated, over a memory; options of `attend`."""
    if memory.turn is not None:
        q = rope(q, *memory.turn)
    where = {"docs": memory.docs, "at": memory.at, "key_at": memory.key_at, "lifetime": memory.lifetime}
    span = None if options.get("window") is None else memory.span
    return attend(q, memory.k.to(q.dtype), memory.v.to(q.dtype), **where, span=span, **options)
