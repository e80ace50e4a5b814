"""Windowed attention that also reads far back, from what an earlier layer wrote (a bounded yoco).

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from model.blocks._gate import HeadGate, apply_gates, gated
from model.blocks.swa import SlidingWindowAttention
from model.blocks.xattn import memory_of
from model.core import Cost, Ctx, Memory, State, Step, merge_aux
from model.ops.attention import Places, attend
from model.ops.attention.cpu import attention_flops
from model.ops.attention.places import resolve
from model.ops.rope import rope
from model.registry import block

CLOSED = -4.0  # sigmoid(-4) = 0.02: training starts from plain windowed attention


@block("recall")
class Recall(SlidingWindowAttention):
    """y = W_o (near + sigmoid(W_g x + b) * far), a gate per head and token, b = -4 at first.

    near: `swa`, over this layer's own keys and values.
    far:  attention of the same queries over the memory of the enclosing yoco, at distances from offset up to
          reach - 1.

    So a deep layer sees what early layers made of tokens long out of its window, at the price of one ring of
    keys and values for all such layers (`memory: {ring: ...}`). The gate is that of Memorizing Transformers
    (arXiv 2203.08913), of the token, and added: a token without a far past reads as in `swa`.

    offset:   the nearest distance that is read far; None is the window's, so that nothing is read twice.
    reach:    the distance from which nothing is read; None is all that the memory holds.
    head_dim: K, the memory's; None takes that, or outside a plan the largest that divides 64 and the width.
    The rest as for `swa`; group and heads are about its own keys, and the memory's heads must divide H.

    State: that of `swa`.
    Raises ValueError without a memory, when its heads do not fit, and unless 0 <= offset < reach.
    """

    reads_memory = "reach"

    def __init__(
        self,
        dim: int,
        *,
        window: int = 512,
        offset: int | None = None,
        reach: int | None = None,
        head_dim: int | None = None,
        group: int = 1,
        heads: int | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        theta: float = 10_000.0,
        qk_norm: bool = False,
        conv: int = 0,
        sinks: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        offset = window if offset is None else offset
        if offset < 0 or (reach is not None and reach <= offset):
            raise ValueError(f"offset={offset}, reach={reach}: must be 0 <= offset < reach")
        super().__init__(
            dim,
            window=window,
            head_dim=math.gcd(dim, 64) if head_dim is None else head_dim,
            group=group,
            heads=heads,
            position=position,
            theta=theta,
            qk_norm=qk_norm,
            conv=conv,
            sinks=sinks,
            gate=gate,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.offset, self.reach = offset, reach
        self.far_gate = HeadGate(dim, self.heads, CLOSED)

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        memory = memory_of(ctx, "recall", self.heads, self.head_dim)
        near, q, after = self.heads_of(x, state, ctx)
        far, stats = apply_gates(self.far_gate(x), self._far(q, memory).flatten(2), ctx)
        y, aux = gated(self.head_gate, near.flatten(2) + far, x, ctx)
        return Step(self.o_proj(y), after, merge_aux([aux, stats.under("far")]))

    def _far(self, q: Tensor, memory: Memory) -> Tensor:
        """Attention over the memory, its keys moved `offset` positions on, so that nearer ones lie ahead."""
        at, key_at = resolve(q, memory.k, memory.docs, memory.at, memory.key_at)
        moved = Places(key_at.positions + self.offset, key_at.segments)
        lifetime = None if memory.lifetime is None else memory.lifetime - self.offset
        own = memory.at is None or memory.span is not None  # the newest keys are the queries' own tokens
        return attend(
            q if memory.turn is None else rope(q, *memory.turn),
            memory.k.to(q.dtype),
            memory.v.to(q.dtype),
            at=at,
            key_at=moved,
            window=None if self.reach is None else self.reach - self.offset,
            span=self.reach if own else None,
            lifetime=lifetime,
            backend=self.backend,
        )

    def cost(self, T: int) -> Cost:
        """`swa`, and the products over a memory of the same T tokens, those under the mask included."""
        far = attention_flops(T, self.heads, self.head_dim, self.reach)
        return super().cost(T) + Cost(float(far))
