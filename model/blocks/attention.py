"""Causal softmax attention with grouped key/value heads and rotary positions.

Shape legend: B batch  T time  D model width  H query heads  G key/value heads  K head width

Parameter names are those of transformers' Llama, Mistral and Qwen3: q_proj k_proj v_proj o_proj, and
q_norm k_norm.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.blocks._gate import gated, head_gate
from model.blocks._heads import GroupedHeads
from model.core import Cost, Ctx, State, Step, docs_of, rotary_positions
from model.ops.attention import attend
from model.ops.attention.cache import Cache, empty_cache, extend
from model.ops.attention.cpu import attention_flops
from model.ops.conv import causal_conv
from model.ops.norm import RMSNorm
from model.ops.rope import rope, rope_tables
from model.ops.select import known_backend
from model.registry import block

POSITIONS = ("rope", "alibi", "none")


class ConvKV(NamedTuple):
    """State with Primer convolutions: the cache, and their last inputs [B, (H + 2 G) K, conv - 1]."""

    kv: Cache
    conv: Tensor


class Projected(NamedTuple):
    """asked, q [B, T, H, K]: queries before and after the rotation; k, v [B, T, G, K]; conv: state of the
    convolutions after the call."""

    asked: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    conv: Tensor | None


@block("attention")
class Attention(GroupedHeads):
    """y = W_o softmax(q k' / sqrt(K)) v over the query's own document, up to the query.

    head_dim: K.
    group:    query heads that share one key/value head: 1 is multi-head, `heads` is multi-query.
    heads:    H; None is dim / head_dim.
    position: "rope" turns q and k by angle position * theta^(-2i/K); "alibi" takes slope_h * distance off
              the logits (arXiv 2108.12409); "none".
    qk_norm:  RMSNorm of every q and k head before the rotation (Qwen3).
    conv:     width of causal depthwise convolutions on q, k and v (Primer, arXiv 2109.08668, has 3), which
              start as the identity; 0 is none.
    sinks:    one learned logit per head that joins every softmax and carries no value, so that a head may
              attend to nothing (gpt-oss).
    gate:     a learned gate per head and token on what the head read; see `model.blocks._gate`.
    backend:  of `model.ops.attention`; a named one never falls back.

    State: the keys and values of each row's last document, `GrowingKV` or, with a capacity, `FixedKV`;
    with `conv`, a `ConvKV`.
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
        position: Literal["rope", "alibi", "none"] = "rope",
        theta: float = 10_000.0,
        qk_norm: bool = False,
        conv: int = 0,
        sinks: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, head_dim, group, heads, rotary=position == "rope", theta=theta)
        if position not in POSITIONS:
            raise ValueError(f"position={position!r}: must be one of {', '.join(POSITIONS)}")
        if conv < 0:
            raise ValueError(f"conv={conv}: a width, or 0 for none")
        self.position, self.backend = position, known_backend("attention", backend)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if sinks else None
        self.conv_weight = nn.Parameter(self._identity_taps(conv)) if conv else None
        self.head_gate = head_gate(gate, dim, self.heads)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        widths = self.head_dim, self.head_dim
        kv = empty_cache(
            batch, like, heads=self.kv_heads, widths=widths, window=self.window, capacity=capacity
        )
        if self.conv_weight is None:
            return kv
        channels, width = self.conv_weight.shape
        return ConvKV(kv, like.new_zeros(batch, channels, width - 1))

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        y, _, after = self.heads_of(x, state, ctx)
        y, aux = gated(self.head_gate, y.flatten(2), x, ctx)
        return Step(self.o_proj(y), after, aux)

    def heads_of(
        self, x: Tensor, state: State | None, ctx: Ctx | None
    ) -> tuple[Tensor, Tensor, State | None]:
        """What the heads made [B, T, H, K], their queries before the rotation, and the state after."""
        kv, conv = state if isinstance(state, ConvKV) else (state, None)
        p = self.project(x, None if kv is None else kv.seen, conv, ctx)
        slopes = alibi_slopes(self.heads, x.device) if self.position == "alibi" else None
        view, after = extend(kv, p.k, p.v, docs_of(ctx))
        y = attend(
            p.q, **view._asdict(), window=self.window, slopes=slopes, sinks=self.sinks, backend=self.backend
        )
        return y, p.asked, after if after is None or p.conv is None else ConvKV(after, p.conv)

    def project(self, x: Tensor, seen: Tensor | None, conv: Tensor | None, ctx: Ctx | None) -> Projected:
        """seen: [B] tokens before these, None without a state; conv: the convolutions' state."""
        docs = docs_of(ctx)
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv_weight is not None:
            qkv = torch.cat(parts, dim=-1)
            taps = self.conv_weight.to(qkv.dtype)
            qkv, conv = causal_conv(qkv, taps, state=conv, docs=docs, want_state=seen is not None)
            parts = qkv.split([p.shape[-1] for p in parts], dim=-1)
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position != "rope":
            return Projected(q, q, k, v, conv)
        rows = 1 if docs is None and seen is None else x.shape[0]
        positions = rotary_positions(ctx, seen, rows, x.shape[1], x.device)
        turn = rope_tables(positions, self.head_dim, self.theta, x.dtype)
        return Projected(q, rope(q, *turn), rope(k, *turn), v, conv)

    def _identity_taps(self, width: int) -> Tensor:
        """[(H + 2 G) K, width]: only the newest tap, so that training starts from plain attention."""
        taps = torch.zeros((self.heads + 2 * self.kv_heads) * self.head_dim, width)
        taps[:, -1] = 1
        return taps

    def cost(self, T: int) -> Cost:
        """FLOPs of the products of SDPA, those under the mask included, as FlopCounterMode counts them.

        torch has no formula for its CPU kernel; `model.ops.attention` registers the one of the CUDA kernels.
        Convolutions are elementwise and not counted, as there.
        """
        flops = attention_flops(
            T,
            self.heads,
            self.head_dim,
            self.window,
            sinks=self.sinks is not None,
            slopes=self.position == "alibi",
        )
        token = 2.0 * self.kv_heads * self.head_dim * self.k_proj.weight.element_size()
        fixed = 8.0  # the count of tokens
        if self.conv_weight is not None:
            channels, width = self.conv_weight.shape
            fixed += channels * (width - 1) * self.conv_weight.element_size()
        if self.window is None:
            return Cost(flops, state_fixed=fixed, state_per_token=token)
        return Cost(flops, state_fixed=fixed + (self.window - 1) * token)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """[H] fp32: 2^(-8 h / H) for h = 1..H; for other than powers of two, the paper's interpolation."""

    def of(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    power = 1 << (heads.bit_length() - 1)
    return torch.tensor((of(power) + of(2 * power)[::2])[:heads], device=device)
