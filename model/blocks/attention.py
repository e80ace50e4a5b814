"""Causal softmax attention with grouped key/value heads and rotary positions.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width

Parameter names are those of transformers' Llama, Mistral and Qwen3: q_proj k_proj v_proj o_proj, and
q_norm k_norm.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from model.core import Block, Cost, Ctx, State, Step, docs_of, positions_of
from model.ops.attention import attend
from model.ops.attention.cache import empty_cache, extend
from model.ops.attention.cpu import attention_flops
from model.ops.norm import RMSNorm
from model.ops.rope import rope, rope_tables
from model.registry import block


@block("attention")
class Attention(Block):
    """y = W_o softmax(q k' / sqrt(K)) v over the query's own document, up to the query.

    head_dim: K.
    group:    query heads that share one key/value head: 1 is multi-head, `heads` is multi-query.
    heads:    H; None is dim / head_dim.
    position: "rope" turns q and k by angle position * theta^(-2i/K), or "none".
    qk_norm:  RMSNorm of every q and k head before the rotation (Qwen3).
    backend:  of `model.ops.attention`; a named one never falls back.

    State: the keys and values of each row's last document, `GrowingKV` or, with a capacity, `FixedKV`.
    Raises ValueError when heads, head_dim and group do not divide.
    """

    window: int | None = None

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        group: int = 1,
        heads: int | None = None,
        position: Literal["rope", "none"] = "rope",
        theta: float = 10_000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        heads = _heads(dim, head_dim, heads)
        if group < 1 or heads % group:
            raise ValueError(f"group={group} must divide the {heads} query heads")
        if position not in ("rope", "none"):
            raise ValueError(f"position={position!r}: must be 'rope' or 'none'")
        if position == "rope" and head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even for RoPE")
        self.heads, self.kv_heads, self.head_dim = heads, heads // group, head_dim
        self.position, self.theta, self.backend = position, theta, backend
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.o_proj.residual_out = True  # type: ignore[assignment]
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        return empty_cache(
            batch,
            like,
            heads=self.kv_heads,
            widths=(self.head_dim, self.head_dim),
            window=self.window,
            capacity=capacity,
        )

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        docs = docs_of(ctx)
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position == "rope":
            seen = None if state is None else state.seen
            rows = 1 if docs is None and seen is None else x.shape[0]
            positions = positions_of(docs, seen, rows, x.shape[1], x.device)
            cos, sin = rope_tables(positions, self.head_dim, self.theta, x.dtype)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        view, state = extend(state, k, v, docs)
        y = attend(q, **view._asdict(), window=self.window, backend=self.backend)
        return Step(self.o_proj(y.flatten(2)), state)

    def cost(self, T: int) -> Cost:
        """FLOPs of the products of SDPA, those under the mask included, as FlopCounterMode counts them.

        torch has no formula for its CPU kernel; `model.ops.attention` registers the one of the CUDA kernels.
        """
        flops = attention_flops(T, self.heads, self.head_dim, self.head_dim, self.window)
        token = 2.0 * self.kv_heads * self.head_dim * self.k_proj.weight.element_size()
        count = 8.0
        if self.window is None:
            return Cost(flops, state_fixed=count, state_per_token=token)
        return Cost(flops, state_fixed=count + (self.window - 1) * token)


def _heads(dim: int, head_dim: int, heads: int | None) -> int:
    if heads is not None:
        return heads
    if dim % head_dim:
        near = [d for d in range(min(dim, head_dim), 0, -1) if dim % d == 0 and d % 2 == 0]
        hint = f" (for example head_dim={near[0]})" if near else ""
        raise ValueError(
            f"dim={dim} is not a multiple of head_dim={head_dim}: change one{hint}, or set heads"
        )
    return dim // head_dim
