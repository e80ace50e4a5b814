"""Gated DeltaNet: the delta rule and a decay (Yang et al. 2024, https://arxiv.org/abs/2412.06464).

Shape legend: B batch  T time  D model width  H heads  K key width  V value width

Parameter names are those of fla's `GatedDeltaNet`: its state_dict loads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._linear import count_heads, decay_rate, initial_dt_bias
from model.blocks.deltanet import DeltaMixer
from model.registry import block


@block("gated_deltanet")
class GatedDeltaNet(DeltaMixer):
    """S' = exp(g_t) S_{t-1},  S_t = S' + beta_t k_t (v_t - k_t^T S')^T,
    y = W_o (norm(K^-1/2 q^T S) * silu(W_g x))

    with beta = sigmoid(W_b x) and g = -exp(A_log) softplus(W_a x + dt_bias), one a head.

    heads, head_dim: H, or V from which H follows; 6 heads by default, the published proportions.
    expand_k, expand_v: H K / D and H V / D.
    conv, negative, gate, backend, conv_backend: as in `deltanet`.

    Raises ValueError when the heads do not share the widths.
    """

    operator = "gated_delta_rule"
    no_decay = ("A_log", "dt_bias")

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv: int = 4,
        negative: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        conv_backend: str = "auto",
    ) -> None:
        heads = count_heads(dim, heads, head_dim, expand_v, default=6)
        super().__init__(
            dim, heads, expand_k, expand_v, conv, negative, norm_eps, backend, conv_backend, gate
        )
        self.a_proj = nn.Linear(dim, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.g_proj = nn.Linear(dim, heads * self.value_width, bias=False)

    def decay(self, x: Tensor) -> Tensor:
        return decay_rate(self.a_proj(x), self.A_log, self.dt_bias)

    def out_gate(self, x: Tensor) -> Tensor:
        return F.silu(self.g_proj(x))
