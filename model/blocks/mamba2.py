"""Mamba-2 (Dao & Gu 2024, https://arxiv.org/abs/2405.21060): a selective state-space layer.

Shape legend: B batch  T time  D model width  I inner width = expand * D  H heads  P head width (I = H P)
              G groups  N state width  W width of the convolution.

Parameter names are those of `mamba_ssm.Mamba2` and transformers' `Mamba2Mixer`: either state_dict loads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks._gate import gated, head_gate
from model.core import Block, Cost, Ctx, Docs, Step, at_least_fp32, docs_of, positions_of
from model.ops.attention import Places
from model.ops.conv import causal_conv
from model.ops.ring import RingState, ring_flops, ring_read
from model.ops.select import known_backend
from model.ops.ssd import ssd, ssd_flops
from model.registry import block


class Mamba2State(NamedTuple):
    """conv [B, I + 2GN, W-1]: the convolution's last inputs; ssm [B, H, N, P]: the recurrent state."""

    conv: Tensor
    ssm: Tensor


class RingedState(NamedTuple):
    """The same with a ring: what past segments wrote."""

    conv: Tensor
    ssm: Tensor
    ring: RingState


@block("mamba2")
class Mamba2(Block):
    """z, x, b, c, dt = W_in u;  x, b, c = silu(conv(x, b, c));  dt = softplus(dt + dt_bias)

        S_t = exp(dt_t A) S_{t-1} + b_t (x) dt_t x_t       y_t = c_t . S_t + D x_t       A = -exp(A_log)

    and the output is W_out (RMSNorm(y * silu(z))), the norm over each group's share of I.

    state, head_dim, groups: N, P and G.  expand: I / D.  conv: W.  chunk: tokens of a chunk (speed only).
    dt_min, dt_max, dt_floor: dt without input is log-uniform in [dt_min, dt_max], at least dt_floor.
    dt_limit: [low, high] to which dt is clamped; None leaves it.
    gate: a learned gate per head and token before W_out; see `model.blocks._gate`.
    ring: {slots: R, stride: s}: what the last R segments of s tokens wrote is kept, and read undecayed,

            y_t += gain sum_i rho_ti c_t . W_i        rho from <W_u u_t, mean b of segment i>

        (`model.ops.ring`). The gain per head starts at 0, so the block starts as it is without a ring.
    backend, conv_backend: of `model.ops.ssd` and `model.ops.conv`; a named one never falls back.

    Raises ValueError when head_dim does not divide I, groups the heads, dt_limit is no interval, or ring
    does not name its two sizes.
    """

    no_decay = ("A_log", "dt_bias", "D")

    def __init__(
        self,
        dim: int,
        *,
        state: int = 128,
        head_dim: int = 64,
        expand: float = 2,
        groups: int = 1,
        conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        chunk: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        dt_limit: list[float] | None = None,
        norm_eps: float = 1e-5,
        gate: bool = False,
        ring: dict[str, int] | None = None,
        backend: str = "auto",
        conv_backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        inner = int(expand * dim)
        self.heads = _heads(dim, inner, head_dim, groups)
        if dt_limit is not None and not (len(dt_limit) == 2 and 0 <= dt_limit[0] < dt_limit[1]):
            raise ValueError(f"dt_limit={dt_limit}: must be [low, high] with 0 <= low < high")
        for name, value in (("state", state), ("conv", conv), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.inner, self.state_width, self.head_dim, self.groups = inner, state, head_dim, groups
        self.chunk, self.dt_limit, self.norm_eps = chunk, dt_limit, norm_eps
        self.backend = known_backend("ssd", backend)
        self.conv_backend = known_backend("conv", conv_backend)
        mixed = inner + 2 * groups * state
        self.in_proj = nn.Linear(dim, inner + mixed + self.heads, bias=bias)
        self.conv1d = nn.Conv1d(mixed, mixed, conv, groups=mixed, bias=conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(_inverse_softplus_dt(self.heads, dt_min, dt_max, dt_floor))
        self.norm = GatedRMSNorm(inner, groups, norm_eps)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.out_proj.residual_out = True  # type: ignore[assignment]
        self.slots, self.stride = _ring_sizes(ring)
        if self.slots:
            self.ring_proj = nn.Linear(dim, groups * state, bias=False)
            self.ring_gain = nn.Parameter(torch.zeros(self.heads))
        self.head_gate = head_gate(gate, dim, self.heads)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> Mamba2State | RingedState:
        C, _, W = self.conv1d.weight.shape
        shape = (self.heads, self.state_width, self.head_dim)
        conv = like.new_zeros(batch, C, W - 1)
        ssm = like.new_zeros(batch, *shape, dtype=at_least_fp32(like.dtype))
        if not self.slots:
            return Mamba2State(conv, ssm)
        sizes = self.heads, self.head_dim, self.groups, self.state_width
        return RingedState(conv, ssm, RingState.empty(like, batch, self.slots, *sizes))

    def forward(
        self, x: Tensor, state: Mamba2State | RingedState | None = None, ctx: Ctx | None = None
    ) -> Step:
        docs, wide = docs_of(ctx), at_least_fp32(x.dtype)
        conv, ssm = (None, None) if state is None else state[:2]
        N, GN = self.state_width, self.groups * self.state_width
        z, xbc, dt = self.in_proj(x).split((self.inner, self.inner + 2 * GN, self.heads), dim=-1)
        xbc, conv_after = causal_conv(
            xbc,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            state=conv,
            docs=docs,
            want_state=state is not None,
            backend=self.conv_backend,
        )
        u, b, c = xbc.split((self.inner, GN, GN), dim=-1)
        u = u.unflatten(-1, (self.heads, self.head_dim))
        b, c = (t.unflatten(-1, (self.groups, N)) for t in (b, c))
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.dt_limit is not None:
            dt = dt.clamp(*self.dt_limit)
        A = -self.A_log.to(wide).exp()
        y, ssm_after = ssd(
            u * dt.to(u.dtype)[..., None],
            dt * A,
            b,
            c,
            state=ssm,
            docs=docs,
            want_state=state is not None,
            chunk=self.chunk,
            step=(u, dt, A),
            backend=self.backend,
        )
        y = torch.addcmul(y, u, self.D.to(u.dtype)[:, None])
        ring_after = None
        if self.slots:
            held = state.ring if isinstance(state, RingedState) else None
            read, ring_after = self._read_ring(x, u * dt.to(u.dtype)[..., None], dt * A, b, c, held, docs)
            y = y + read.to(y.dtype)
        y, aux = gated(self.head_gate, self.norm(y.flatten(-2), z), x, ctx)
        y = self.out_proj(y)
        if state is None or conv_after is None or ssm_after is None:
            return Step(y, aux=aux)
        conv_after = conv_after.to(state.conv.dtype)
        if ring_after is not None:
            return Step(y, RingedState(conv_after, ssm_after, ring_after), aux)
        return Step(y, Mamba2State(conv_after, ssm_after), aux)

    def _read_ring(
        self,
        x: Tensor,
        u: Tensor,
        log_a: Tensor,
        b: Tensor,
        c: Tensor,
        held: RingState | None,
        docs: Docs | None,
    ) -> tuple[Tensor, RingState | None]:
        """What the ring adds, [B, T, H, P] in fp32 at least, and the ring after the call."""
        B, T, _ = x.shape
        positions = positions_of(docs, None if held is None else held.seen, B, T, x.device).expand(B, T)
        at = Places(positions, torch.zeros_like(positions) if docs is None else docs.segments)
        asked = self.ring_proj(x).unflatten(-1, (self.groups, -1))
        read, after = ring_read(
            u, log_a, b, c, asked, slots=self.slots, stride=self.stride, at=at, state=held
        )
        return read * self.ring_gain.to(read.dtype)[:, None], after

    def cost(self, T: int) -> Cost:
        """FLOPs of the chunked scan's matmuls; the convolution is elementwise, which is not counted."""
        C, _, W = self.conv1d.weight.shape
        flops = ssd_flops(T, self.heads, self.head_dim, self.groups, self.state_width, self.chunk)
        held = C * (W - 1) * self.conv1d.weight.element_size()
        wide = at_least_fp32(self.conv1d.weight.dtype).itemsize
        held += self.inner * self.state_width * wide
        if self.slots:
            H, P, G, N = self.heads, self.head_dim, self.groups, self.state_width
            flops += ring_flops(T, H, P, G, N, self.slots, self.stride)
            held += (self.slots + 1) * (H * P + G) * N * wide + 8
        return Cost(float(flops), state_fixed=float(held))


class GatedRMSNorm(nn.Module):
    """weight * RMSNorm(y * silu(z)) over each of `groups` equal shares of the last dimension."""

    def __init__(self, dim: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)
        return normed * self.weight.to(normed.dtype)


def _heads(dim: int, inner: int, head_dim: int, groups: int) -> int:
    if inner < 1 or head_dim < 1 or inner % head_dim:
        near = [d for d in range(min(head_dim, inner), 0, -1) if inner % d == 0]
        hint = f"; for example head_dim={near[0]}" if near else ""
        raise ValueError(f"head_dim={head_dim} must divide the inner width {inner} of dim={dim}{hint}")
    heads = inner // head_dim
    if groups < 1 or heads % groups:
        raise ValueError(f"groups={groups} must divide the {heads} heads of dim={dim}")
    return heads


def _ring_sizes(ring: dict[str, int] | None) -> tuple[int, int]:
    """(slots, stride); (0, 0) for none."""
    if ring is None:
        return 0, 0
    if set(ring) != {"slots", "stride"} or min(ring.values()) < 1:
        raise ValueError(f"ring={ring}: must be {{slots: R, stride: s}}, both at least 1")
    return ring["slots"], ring["stride"]


def _inverse_softplus_dt(heads: int, low: float, high: float, floor: float) -> Tensor:
    """[H] such that softplus of it is log-uniform in [low, high], at least `floor`."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min={low}, dt_max={high}: must be 0 < dt_min <= dt_max")
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))
