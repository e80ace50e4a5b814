"""What linear-attention blocks share: head widths, short convolutions, head norm, state, initial decays.

Shape legend: B batch  T time  D model width  H heads  K key width  V value width  W width of a convolution

Parameter names are those of flash-linear-attention's layers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import head_gate
from model.core import Block, Cost, at_least_fp32
from model.ops.conv import causal_conv
from model.ops.documents import Documents
from model.ops.select import known_backend


class LinearState(NamedTuple):
    """conv: the last W-1 inputs of each convolution, [B, C, W-1]; recurrent: [B, H, K, V]."""

    conv: tuple[Tensor, ...]
    recurrent: Tensor


class ShortConv(nn.Conv1d):
    """Causal depthwise convolution of width W and SiLU over [B, T, C]; documents never mix.

    It starts with the newest tap alone, as in `attention`: from torch's random taps, which blur what a token
    is, models of width 128 were 0.19 (deltanet) and 0.05 (gla) bits per byte behind after 60,000 tokens.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)
        with torch.no_grad():
            self.weight.zero_()[..., -1] = 1

    def forward(  # type: ignore[override]
        self, x: Tensor, state: Tensor | None, docs: Documents | None, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        y, last = causal_conv(
            x,
            self.weight.squeeze(1),
            activation="silu",
            state=state,
            docs=docs,
            want_state=state is not None,
            backend=backend,
        )
        return y, last if state is None or last is None else last.to(state.dtype)


class HeadNorm(nn.Module):
    """RMSNorm of every head's V channels, times the activated gate: weight * norm(o) * act(gate)."""

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """o [B, T, H, V], gate [B, T, H * V], already activated -> [B, T, H * V]."""
        weight = None if self.weight is None else self.weight.to(o.dtype)
        y = F.rms_norm(o, o.shape[-1:], weight, self.eps).flatten(2)
        return y if gate is None else y * gate


class LinearMixer(Block):
    """Projections, optional short convolutions, and the state of a linear-attention block.

    operator: of `model.ops`, to which `backend` belongs.
    heads, head_dim: one of them; head_dim is V, the width of a value head, H = expand_v * dim / V.
    gate: a learned gate per head and token before the output matrix; see `model.blocks._gate`.
    """

    operator: str

    def __init__(
        self,
        dim: int,
        heads: int,
        expand_k: float,
        expand_v: float,
        conv: int,
        backend: str,
        conv_backend: str,
        gate: bool = False,
    ) -> None:
        super().__init__(dim)
        self.heads, self.backend = heads, known_backend(self.operator, backend)
        self.conv_backend = known_backend("conv", conv_backend)
        self.key_width = share(dim, expand_k, heads, "expand_k")
        self.value_width = share(dim, expand_v, heads, "expand_v")
        if conv < 0:
            raise ValueError(f"conv={conv}: must be a width, or 0 for none")
        self.conv_width = conv
        keys, values = heads * self.key_width, heads * self.value_width
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        if conv:
            self.q_conv1d = ShortConv(keys, conv)
            self.k_conv1d = ShortConv(keys, conv)
            self.v_conv1d = ShortConv(values, conv)
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.o_proj.residual_out = True  # type: ignore[assignment]
        self.head_gate = head_gate(gate, dim, heads)
        self.row_groups = {"q_proj.weight": heads, "k_proj.weight": heads}

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> LinearState:
        conv = tuple(like.new_zeros(batch, c, self.conv_width - 1) for c in self._conv_channels())
        return LinearState(conv, self.empty_recurrent(batch, like))

    def empty_recurrent(self, batch: int, like: Tensor) -> Tensor:
        shape = (batch, self.heads, self.key_width, self.value_width)
        return like.new_zeros(shape, dtype=at_least_fp32(like.dtype))

    def qkv(
        self, x: Tensor, conv: Sequence[Tensor] | None, docs: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """q, k [B, T, H, K], v [B, T, H, V], convolved if the block does, and the convolutions' states."""
        flat = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        after: list[Tensor] = []
        if self.conv_width:
            for i, convolve in enumerate((self.q_conv1d, self.k_conv1d, self.v_conv1d)):
                before = conv[i] if conv else None
                flat[i], last = convolve(flat[i], before, docs, self.conv_backend)
                after += [] if last is None else [last]
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in flat)
        return q, k, v, tuple(after)

    def state_bytes(self) -> float:
        """Bytes of a state per row."""
        weight = self.o_proj.weight
        conv = sum(self._conv_channels()) * (self.conv_width - 1) * weight.element_size()
        recurrent = self.heads * self.key_width * self.value_width
        return float(conv + recurrent * at_least_fp32(weight.dtype).itemsize)

    @abstractmethod
    def flops(self, T: int) -> int:
        """Matmul flops of the operator over one row."""

    def cost(self, T: int) -> Cost:
        """FLOPs of the chunk form's matmuls; convolutions and decays are elementwise and not counted."""
        return Cost(float(self.flops(T)), state_fixed=self.state_bytes())

    def _conv_channels(self) -> list[int]:
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        return [keys, keys, values] if self.conv_width else []


def count_heads(dim: int, heads: int | None, head_dim: int | None, expand_v: float, default: int) -> int:
    """H from `heads` or from `head_dim`, which is V; `default` when neither is given.

    Raises ValueError when both are given, or head_dim does not divide.
    """
    if heads is not None and head_dim is not None:
        raise ValueError(f"give heads={heads} or head_dim={head_dim}, not both")
    if head_dim is None:
        return default if heads is None else heads
    values = round(dim * expand_v)
    if head_dim < 1 or values % head_dim:
        raise ValueError(f"head_dim={head_dim} must divide the value width {values} of dim={dim}")
    return values // head_dim


def heads_of_width(dim: int, width: int) -> int:
    """The largest H that divides dim and gives heads of at least `width` (1 for a narrow model)."""
    heads = max(1, dim // width)
    while dim % heads:
        heads -= 1
    return heads


def share(dim: int, expand: float, heads: int, name: str) -> int:
    """Channels of a head: expand * dim / heads. Raises ValueError when that is no whole number."""
    width = round(dim * expand)
    if heads < 1 or width < 1 or not math.isclose(width, dim * expand) or width % heads:
        raise ValueError(
            f"{name}={expand} of dim={dim} is {dim * expand:g}, which {heads} heads do not share"
        )
    return width // heads


def check_normalizer(gate_normalizer: float) -> None:
    """Raises ValueError unless logsigmoid(.) / gate_normalizer is a log decay."""
    if gate_normalizer <= 0:
        raise ValueError(
            f"gate_normalizer={gate_normalizer}: must be above 0, or decays would not be below 1"
        )


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in at least fp32; zero stays zero."""
    wide = x.to(at_least_fp32(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def decay_rate(raw: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The log decay -exp(A_log) softplus(raw + dt_bias), in at least fp32."""
    wide = at_least_fp32(raw.dtype)
    return -A_log.to(wide).exp() * F.softplus(raw.to(wide) + dt_bias.to(wide))


def initial_dt_bias(n: int) -> Tensor:
    """[n] such that softplus of it is log-uniform in [1e-3, 0.1], as in Mamba-2."""
    dt = torch.empty(n).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
    return dt + torch.log(-torch.expm1(-dt))
