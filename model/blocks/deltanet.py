"""DeltaNet: linear attention that corrects its memory (Yang et al. 2024, https://arxiv.org/abs/2406.06484).

Shape legend: B batch  T time  D model width  H heads  K key width  V value width

Parameter names are those of fla's `DeltaNet`: its state_dict loads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import gated
from model.blocks._linear import HeadNorm, LinearMixer, LinearState, count_heads, unit
from model.core import Ctx, Step, at_least_fp32, docs_of
from model.ops.documents import Documents
from model.ops.linear import delta_flops, delta_rule
from model.registry import block


class DeltaMixer(LinearMixer):
    """What the delta-rule blocks share: q, k of norm 1 after a short convolution and SiLU, and beta.

    A subclass gives the log decay (`decay`) and the output gate (`out_gate`).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expand_k: float,
        expand_v: float,
        conv: int,
        negative: bool,
        norm_eps: float,
        backend: str,
        conv_backend: str,
        gate: bool,
    ) -> None:
        super().__init__(dim, heads, expand_k, expand_v, conv, backend, conv_backend, gate)
        self.negative = negative
        self.b_proj = nn.Linear(dim, heads, bias=False)
        self.o_norm = HeadNorm(self.value_width, norm_eps)

    def decay(self, x: Tensor) -> Tensor | None:
        """The log decay [B, T, H] or [B, T, H, K], or None."""
        return None

    def out_gate(self, x: Tensor) -> Tensor | None:
        """The activated output gate [B, T, H * V], or None."""
        return None

    def forward(self, x: Tensor, state: LinearState | None = None, ctx: Ctx | None = None) -> Step:
        docs: Documents | None = docs_of(ctx)
        q, k, v, conv = self.qkv(x, None if state is None else state.conv, docs)
        if not self.conv_width:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        raw = self.b_proj(x)
        beta = raw.to(at_least_fp32(raw.dtype)).sigmoid() * (2 if self.negative else 1)
        before = None if state is None else state.recurrent
        o, after = delta_rule(
            unit(q), unit(k), v, beta, self.decay(x), state=before, docs=docs, backend=self.backend
        )
        y, aux = gated(self.head_gate, self.o_norm(o, self.out_gate(x)), x, ctx)
        y = self.o_proj(y).to(x.dtype)
        return Step(y, None if state is None else LinearState(conv, after), aux)

    def flops(self, T: int) -> int:
        return delta_flops(T, self.heads, self.key_width, self.value_width)


@block("deltanet")
class DeltaNet(DeltaMixer):
    """S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T,  y = W_o norm(K^-1/2 q^T S),  beta = sigmoid(W_b x)

    heads, head_dim: H, or V from which H follows; 4 heads by default.  expand_k, expand_v: H K / D, H V / D.
    conv:     width of the short convolutions on q, k, v (SiLU follows); 0 leaves SiLU alone.
    negative: beta in (0, 2) instead of (0, 1): eigenvalues of the state's transition in (-1, 1), which
              track parity (Grazzi et al., arXiv 2411.12537).
    use_gate: multiply the normed output by silu(W_g x).
    gate:     a gate per head and token before W_o; see `model.blocks._gate`.
    backend, conv_backend: of `model.ops.linear` and `model.ops.conv`; a named one never falls back.

    Raises ValueError when the heads do not share the widths.
    """

    operator = "delta_rule"

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        negative: bool = False,
        use_gate: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        conv_backend: str = "auto",
    ) -> None:
        heads = count_heads(dim, heads, head_dim, expand_v, default=4)
        super().__init__(
            dim, heads, expand_k, expand_v, conv, negative, norm_eps, backend, conv_backend, gate
        )
        self.g_proj = nn.Linear(dim, heads * self.value_width, bias=False) if use_gate else None

    def out_gate(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else F.silu(self.g_proj(x))
