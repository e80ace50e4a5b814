"""Gated retention, the self-decoder of YOCO (Sun et al. 2024, https://arxiv.org/abs/2405.05254).

Shape legend: B batch  T time  D model width  H heads  K head width

Parameter names are those of fla's `YOCOGatedRetention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import gated
from model.blocks._linear import HeadNorm, LinearMixer, check_normalizer, count_heads
from model.core import Cost, Ctx, Step, at_least_fp32, count_tokens, docs_of, rotary_positions
from model.ops.linear import gla, simple_gla_flops
from model.ops.rope import check_rope, rope, rope_tables
from model.registry import block


class RetentionState(NamedTuple):
    """seen: [B] int64, tokens so far (the next position); recurrent: [B, H, K, V]."""

    seen: Tensor
    recurrent: Tensor


@block("retention")
class Retention(LinearMixer):
    """S_t = exp(g_t) S_{t-1} + K^-1/2 k_t v_t^T,  y = W_o (norm(q^T S) * silu(W_g x))

    with q and k turned by RoPE, one decay a head, g = logsigmoid(W_gk x) / 16, and a norm without weight.

    heads, head_dim: H, or V from which H follows; 4 heads by default.  expand_k, expand_v: H K / D, H V / D.
    theta: base of RoPE.  gate_normalizer: the 16 above.
    gate: a gate per head and token before W_o; see `model.blocks._gate`.
    backend: of `model.ops.ssd`, which serves a decay a head; a named one never falls back.

    Raises ValueError when the heads do not share the widths, K is odd, theta or gate_normalizer not above 0.
    """

    operator = "ssd"

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        theta: float = 10_000.0,
        gate_normalizer: float = 16.0,
        gate: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        heads = count_heads(dim, heads, head_dim, expand_v, default=4)
        super().__init__(dim, heads, expand_k, expand_v, 0, backend, "auto", gate)
        check_rope(self.key_width, theta)
        check_normalizer(gate_normalizer)
        self.theta, self.gate_normalizer = theta, gate_normalizer
        self.gk_proj = nn.Linear(dim, heads, bias=False)
        self.g_proj = nn.Linear(dim, heads * self.value_width, bias=False)
        self.o_norm = HeadNorm(self.value_width, norm_eps, affine=False)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> RetentionState:  # type: ignore[override]
        return RetentionState(
            torch.zeros(batch, dtype=torch.int64, device=like.device), self.empty_recurrent(batch, like)
        )

    def forward(self, x: Tensor, state: RetentionState | None = None, ctx: Ctx | None = None) -> Step:
        docs, (B, T, _) = docs_of(ctx), x.shape
        q, k, v, _ = self.qkv(x, None, docs)
        seen = None if state is None else state.seen
        cos, sin = rope_tables(
            rotary_positions(ctx, seen, B, T, x.device), self.key_width, self.theta, x.dtype
        )
        raw = self.gk_proj(x)
        g = F.logsigmoid(raw.to(at_least_fp32(raw.dtype))) / self.gate_normalizer
        before = None if state is None else state.recurrent
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        want = state is not None
        o, after = gla(q, k, v, g, state=before, docs=docs, want_state=want, backend=self.backend)
        y, aux = gated(self.head_gate, self.o_norm(o, F.silu(self.g_proj(x))), x, ctx)
        y = self.o_proj(y).to(x.dtype)
        if after is None:
            return Step(y, aux=aux)
        return Step(y, RetentionState(count_tokens(docs, seen, B, T, x.device), after), aux)

    def flops(self, T: int) -> int:
        return simple_gla_flops(T, self.heads, self.key_width, self.value_width)

    def cost(self, T: int) -> Cost:
        return super().cost(T) + Cost(state_fixed=8.0)
