"""RWKV-6 "Finch", the time mix; the channel mix is `{mlp: {act: rwkv}}` (Peng et al. 2024, https://arxiv.org/abs/2404.05892).

Shape legend: B batch  T time  D model width  H heads  K key width  V value width  R rank of a projection

Parameter names are those of fla's `RWKV6Attention`; initial values are the paper's.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import gated, head_gate
from model.blocks._linear import count_heads, heads_of_width, share
from model.core import Block, Cost, Ctx, Step, at_least_fp32, docs_of
from model.ops.linear import gla_flops, rwkv6
from model.ops.select import known_backend
from model.ops.shift import last_token, token_before
from model.registry import block

STREAMS = 5  # r, w, k, v, g: what the data-dependent token shift mixes for


class RWKV6State(NamedTuple):
    """last: [B, D], the last input; recurrent: [B, H, K, V]."""

    last: Tensor
    recurrent: Tensor


class Lerp(nn.Module):
    """linear(x + mu (x_before - x)): between a token and the one before it."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(dim))
        self.linear = nn.Linear(dim, out, bias=False)

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.linear(x + delta * self.mu.to(x.dtype))


class Mixed(nn.Module):
    """linear(x + mu (x_before - x)) with mu from the data, [B, T, D]."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, delta: Tensor, mu: Tensor) -> Tensor:
        return self.linear(torch.addcmul(x, delta, mu.to(x.dtype)))


class LowRank(nn.Module):
    """bias + B tanh(A x), A [R, D]."""

    def __init__(self, dim: int, out: int, rank: int) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Tanh(), nn.Linear(rank, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


@block("rwkv6")
class RWKV6(Block):
    """o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),  S_t = diag(w_t) S_{t-1} + k_t v_t^T,  w = exp(-exp(.)),
    y = W_o (group_norm(o) * silu(g))

    where r, w, k, v, g are made of x_t + mu (x_{t-1} - x_t), mu from the data by a low-rank map.

    heads, head_dim: H, or V from which H follows; by default heads of width 64, or one narrower.
    expand_k, expand_v: H K / D and H V / D.  shift_rank, decay_rank: of the maps to mu and to w.
    depth: place in the stack from 0 (first layer) to 1 (last), which the initial values depend on.
    gate: a gate per head and token before W_o; see `model.blocks._gate`.
    backend: of `model.ops.linear`; a named one never falls back.

    Raises ValueError when the heads do not share the widths, depth is outside [0, 1], or a rank below 1.
    """

    no_decay = ("bonus", "x_bias")

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        shift_rank: int = 32,
        decay_rank: int = 64,
        depth: float = 0.5,
        gate: bool = False,
        norm_eps: float = 64e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        heads = count_heads(dim, heads, head_dim, expand_v, default=heads_of_width(dim, 64))
        self.heads, self.backend = heads, known_backend("rwkv6", backend)
        if not 0 <= depth <= 1 or min(shift_rank, decay_rank) < 1:
            raise ValueError(
                f"depth={depth} lies between 0 and 1; shift_rank={shift_rank}, decay_rank={decay_rank} are at"
                " least 1"
            )
        self.key_width = share(dim, expand_k, heads, "expand_k")
        self.value_width = share(dim, expand_v, heads, "expand_v")
        keys, values = heads * self.key_width, heads * self.value_width
        shift = Lerp(dim, STREAMS * shift_rank)
        self.x_proj = nn.Sequential(shift, nn.Tanh(), nn.Linear(STREAMS * shift_rank, dim, bias=False))
        self.x_proj[2].as_matrix = True  # type: ignore[assignment]  # `forward` cuts its weight into streams
        self.x_bias = nn.Parameter(torch.zeros(STREAMS, dim))
        self.r_proj = Mixed(nn.Linear(dim, keys, bias=False))
        decay = LowRank(dim, keys, decay_rank)
        self.w_proj = Mixed(decay)
        self.k_proj = Mixed(nn.Linear(dim, keys, bias=False))
        self.v_proj = Mixed(nn.Linear(dim, values, bias=False))
        self.g_proj = Mixed(nn.Linear(dim, values, bias=False))
        self.bonus = nn.Parameter(torch.zeros(heads, self.key_width))
        self.g_norm = nn.GroupNorm(heads, values, eps=norm_eps)
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.o_proj.residual_out = True  # type: ignore[assignment]
        self.head_gate = head_gate(gate, dim, heads)
        self._reset(depth, shift, decay)

    @torch.no_grad()
    def _reset(self, depth: float, shift: Lerp, decay: LowRank) -> None:
        """The paper's initial values: slow to fast decays, bonus and token shift by channel and depth."""
        keys = self.bonus.numel()
        along = torch.arange(keys) / max(keys - 1, 1)
        down, _, up = decay.lora
        for weight, bound in (
            (shift.linear.weight, 1e-4),
            (self.x_proj[2].get_parameter("weight"), 0.01),
            (down.get_parameter("weight"), 1e-4),
            (up.get_parameter("weight"), 0.01),
        ):
            nn.init.uniform_(weight, -bound, bound)
        up.get_parameter("bias").copy_(-6 + 5 * along ** (0.7 + 1.3 * depth))
        zigzag = ((torch.arange(keys) + 1) % 3 - 1) * 0.1
        self.bonus.copy_((depth * (1 - along) + zigzag).view_as(self.bonus))
        place = _channel_shares(self.dim)
        late = 1 - place ** (1 - depth)
        shift.mu.copy_(late)
        r = 1 - place ** (0.5 * (1 - depth))
        self.x_bias.copy_(torch.stack([r, late, late, late - 0.3 * depth, r]))

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> RWKV6State:
        shape = (batch, self.heads, self.key_width, self.value_width)
        recurrent = like.new_zeros(shape, dtype=at_least_fp32(like.dtype))
        return RWKV6State(like.new_zeros(batch, self.dim), recurrent)

    def forward(self, x: Tensor, state: RWKV6State | None = None, ctx: Ctx | None = None) -> Step:
        docs = docs_of(ctx)
        delta = token_before(x, None if state is None else state.last, docs) - x
        low = torch.tanh(self.x_proj[0](x, delta)).unflatten(-1, (STREAMS, -1))
        up = cast(nn.Linear, self.x_proj[2]).weight.unflatten(1, (STREAMS, -1))
        mus = torch.einsum("btsr,dsr->sbtd", low, up.to(low.dtype))
        mus = mus + self.x_bias[:, None, None].to(mus.dtype)
        projs = (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj)
        r, w, k, v, g = (proj(x, delta, mu) for proj, mu in zip(projs, mus))
        r, w, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (r, w, k, v))
        # exp(10) forgets everything already; more would only overflow in the gradient
        w = -w.to(at_least_fp32(w.dtype)).clamp_max(10.0).exp()
        recurrent = None if state is None else state.recurrent
        o, after = rwkv6(r, k, v, w, self.bonus, state=recurrent, docs=docs, backend=self.backend)
        normed = F.group_norm(
            o.flatten(2).flatten(0, 1),
            self.heads,
            self.g_norm.weight.to(o.dtype),
            self.g_norm.bias.to(o.dtype),
            self.g_norm.eps,
        )
        y, aux = gated(self.head_gate, normed.view_as(g) * F.silu(g), x, ctx)
        y = self.o_proj(y).to(x.dtype)
        return Step(y, None if state is None else RWKV6State(last_token(x, state.last, docs), after), aux)

    def cost(self, T: int) -> Cost:
        """FLOPs of the chunk form's matmuls; the token shift is elementwise and not counted."""
        size, wide = self.o_proj.weight.element_size(), at_least_fp32(self.o_proj.weight.dtype).itemsize
        held = self.dim * size + self.heads * self.key_width * self.value_width * wide
        flops = gla_flops(T, self.heads, self.key_width, self.value_width)
        return Cost(float(flops), state_fixed=float(held))


def _channel_shares(dim: int) -> Tensor:
    """[D] from 0 to 1 - 1/D: the first channels look back, the last at the token itself."""
    return torch.arange(dim) / dim
