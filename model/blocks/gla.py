"""Gated linear attention (Yang et al. 2023, https://arxiv.org/abs/2312.06635).

Shape legend: B batch  T time  D model width  H heads  K key width  V value width

Parameter names are those of fla's `GatedLinearAttention`: its state_dict loads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import gated
from model.blocks._linear import HeadNorm, LinearMixer, LinearState, check_normalizer, count_heads
from model.core import Ctx, Step, at_least_fp32, docs_of
from model.ops.linear import gla, gla_flops
from model.registry import block


@block("gla")
class GLA(LinearMixer):
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  y = W_o (norm(K^-1/2 q^T S) * silu(W_g x))

    with g = logsigmoid(low-rank(x)) / 16 in every key channel.

    heads, head_dim: H, or V from which H follows; 4 heads by default.
    expand_k, expand_v: H K / D and H V / D.  conv: width of short convolutions on q, k, v; 0 is none.
    gate_rank: rank of the decay's projection.  gate_normalizer: the 16 above.
    gate_floor: clamp g to at least this; -0.9 or more lets the fast form be chosen without looking.
    gate: a gate per head and token before W_o; see `model.blocks._gate`.
    backend, conv_backend: of `model.ops.linear` and `model.ops.conv`; a named one never falls back.

    Raises ValueError when the heads do not share the widths, and for a gate that could make a state grow.
    """

    operator = "gla"

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        conv: int = 0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        gate_floor: float | None = None,
        gate: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        conv_backend: str = "auto",
    ) -> None:
        heads = count_heads(dim, heads, head_dim, expand_v, default=4)
        super().__init__(dim, heads, expand_k, expand_v, conv, backend, conv_backend, gate)
        check_normalizer(gate_normalizer)
        if gate_rank < 1 or (gate_floor is not None and gate_floor > 0):
            raise ValueError(
                f"gate_rank={gate_rank} must be at least 1, and gate_floor={gate_floor} at most 0"
            )
        self.gate_normalizer, self.gate_floor = gate_normalizer, gate_floor
        self.gk_proj = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, heads * self.key_width)
        )
        self.g_proj = nn.Linear(dim, heads * self.value_width, bias=False)
        self.g_norm_swish_gate = HeadNorm(self.value_width, norm_eps)

    def forward(self, x: Tensor, state: LinearState | None = None, ctx: Ctx | None = None) -> Step:
        docs = docs_of(ctx)
        q, k, v, conv = self.qkv(x, None if state is None else state.conv, docs)
        raw = self.gk_proj(x).unflatten(-1, (self.heads, -1))
        g = F.logsigmoid(raw.to(at_least_fp32(raw.dtype))) / self.gate_normalizer
        if self.gate_floor is not None:
            g = g.clamp_min(self.gate_floor)
        o, after = gla(
            q,
            k,
            v,
            g,
            state=None if state is None else state.recurrent,
            docs=docs,
            floor=self.gate_floor,
            want_state=state is not None,
            backend=self.backend,
        )
        y, aux = gated(self.head_gate, self.g_norm_swish_gate(o, F.silu(self.g_proj(x))), x, ctx)
        y = self.o_proj(y)
        return Step(y.to(x.dtype), None if after is None else LinearState(conv, after), aux)

    def flops(self, T: int) -> int:
        return gla_flops(T, self.heads, self.key_width, self.value_width)
