"""Kimi Delta Attention: Gated DeltaNet with a decay per channel (https://arxiv.org/abs/2510.26692).

Shape legend: B batch  T time  D model width  H heads  K key width  V value width

Parameter names are those of fla's `KimiDeltaAttention`: its state_dict loads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.blocks._linear import count_heads, decay_rate, heads_of_width, initial_dt_bias
from model.blocks.deltanet import DeltaMixer
from model.ops.linear import delta_flops
from model.registry import block


@block("kda")
class KDA(DeltaMixer):
    """S' = diag(exp g_t) S_{t-1},  S_t = S' + beta_t k_t (v_t - k_t^T S')^T,
    y = W_o (norm(K^-1/2 q^T S) * sigmoid(low-rank(x)))

    with beta = sigmoid(W_b x) and g = -exp(A_log) softplus(low-rank(x) + dt_bias), one a channel.

    heads, head_dim: H, or V from which H follows; by default heads of width 128, or one narrower.
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
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        negative: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        conv_backend: str = "auto",
    ) -> None:
        heads = count_heads(dim, heads, head_dim, expand_v, default=heads_of_width(dim, 128))
        super().__init__(
            dim, heads, expand_k, expand_v, conv, negative, norm_eps, backend, conv_backend, gate
        )
        keys, values, rank = heads * self.key_width, heads * self.value_width, self.value_width
        self.f_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, keys, bias=False))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(initial_dt_bias(keys))
        self.g_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, values))

    def decay(self, x: Tensor) -> Tensor:
        raw, bias = (t.unflatten(-1, (self.heads, -1)) for t in (self.f_proj(x), self.dt_bias))
        return decay_rate(raw, self.A_log[:, None], bias)

    def out_gate(self, x: Tensor) -> Tensor:
        return self.g_proj(x).sigmoid()

    def flops(self, T: int) -> int:
        return delta_flops(T, self.heads, self.key_width, self.value_width, per_channel=True)
