"""Per-channel decay in chunks of batched matmuls, with a backward pass written by hand: GLA and RWKV-6.

Shape legend: B batch  T time  H heads  K key width  V value width  C chunks  Q tokens of a chunk.
Chunked tensors are [C, B, H, Q, .]; see `chunks` for documents and `decay` for the two forms.

With c the running sum of the log decays in a chunk (cq: up to and with the token for GLA, before it for
RWKV-6) and S the state before the chunk:

    o_i = sum_{j<=i} (sum_d q_id k_jd e^(cq_id - c_jd)) v_j + (q_i e^cq_i) S
    S'  = e^(c_Q) S + sum_j (k_j e^(c_Q - c_j)) v_j^T

(Yang et al. 2023, https://arxiv.org/abs/2312.06635.) Since a log decay enters only beside q and k, its
gradient needs no pass of its own: dc = q dq - k dk, and at the end of a chunk what the state carries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.ops.documents import Documents, zero_padding
from model.ops.dtypes import at_least_fp32
from model.ops.linear.chunks import Chunks, operand
from model.ops.linear.decay import EXACT_CHUNK, NARROW_CHUNK, factors, is_narrow, running_sum


def gla_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the state [B, H, K, V]; arguments as in `gla`.

    exclusive: o_t reads the state before token t, without its decay and without the token itself.
    """
    B, T, H, K = q.shape
    acc = at_least_fp32(v.dtype)
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1], dtype=acc)
    if T == 0 or B == 0:
        return v.clone(), state.to(acc, copy=True)
    q, k, v, g = zero_padding(docs, q, k, v, g)
    narrow = is_narrow(g, floor)
    layout = Chunks.of(T, NARROW_CHUNK if narrow else EXACT_CHUNK, docs, q.device)
    with torch.autocast(q.device.type, enabled=False):
        qc, kc, vc = (layout.split(x, operand(v.dtype)) for x in (q * scale, k, v))
        gc = layout.split(g, acc)
        if T == 1:
            return _one_step(qc, kc, vc, gc, layout.owned(state.to(acc)), exclusive, layout, v.dtype)
        o, last, _ = _ChunkedGLA.apply(qc, kc, vc, gc, state, layout, not narrow, exclusive)
        return layout.join(o).to(v.dtype), last


def rwkv6_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    u: Tensor,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gla_chunked` for what came before, and the bonus of each token for itself."""
    q, k, v, g = zero_padding(docs, q, k, v, g)
    o, last = gla_chunked(q, k, v, g, scale=scale, state=state, docs=docs, floor=floor, exclusive=True)
    with torch.autocast(q.device.type, enabled=False):
        acc = at_least_fp32(v.dtype)
        own = (q.to(acc) * (u * scale).to(acc) * k).sum(-1, keepdim=True)
        return torch.addcmul(o, own.to(v.dtype), v), last


def gla_flops(T: int, H: int, K: int, V: int) -> int:
    """Forward matmul flops (a multiply-add is 2) of one row of `gla_chunked` in its narrow form."""
    if T <= 1:
        return 0
    Q = min(NARROW_CHUNK, T)
    C = -(-T // Q)
    return 2 * C * H * (Q * Q * K + Q * Q * V + 2 * Q * K * V)


def _one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S: Tensor,
    exclusive: bool,
    layout: Chunks,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """T = 1, the decoding step: no matmul is worth its dispatch. Arguments are [1, B, H, 1, .]."""
    qt, kt, gt = (x[0].mT.to(S.dtype) for x in (q, k, g))  # [B, H, K, 1]
    new = torch.addcmul(kt * v[0].to(S.dtype), gt.exp(), S)
    o = (qt * (S if exclusive else new)).sum(2, keepdim=True)[None]
    return layout.join(o).to(dtype), new


class _Parts(NamedTuple):
    """What both passes need, [C, B, H, Q, K] each: decayed operands and the factors that decayed them."""

    c: Tensor  # running sums
    eq: Tensor  # pair factors
    ek: Tensor
    qe: Tensor  # q eq, k ek
    ke: Tensor
    head: Tensor  # from the state before the chunk to i
    tail: Tensor  # from j to the state after the chunk


def _parts(q: Tensor, k: Tensor, g: Tensor, layout: Chunks, exact: bool, exclusive: bool) -> _Parts:
    g, c = running_sum(g, layout, exact)
    cq = c - g if exclusive else c
    eq, ek = factors(cq, c, exact, q.dtype)
    if exact or layout.head is not None:
        head = layout.at_head(cq, at_least_fp32(q.dtype)).to(q.dtype)
    else:
        head = eq
    tail = layout.to_tail(c, at_least_fp32(q.dtype)).to(q.dtype)
    return _Parts(c, eq, ek, q * eq, k * ek, head, tail)


class _ChunkedGLA(torch.autograd.Function):
    """Chunked q, k, v in the operand dtype; g and state at least fp32. Gives o, the last state, and
    the states before the chunks, which are kept for backward."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        state: Tensor,
        layout: Chunks,
        exact: bool,
        exclusive: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = _parts(q, k, g, layout, exact, exclusive)
        weights = layout.lower(p.qe @ p.ke.mT, strict=exclusive).to(q.dtype)
        added = (k * p.tail).mT @ v
        through = layout.across(p.c, g.dtype)
        starts = torch.empty_like(added)  # read in the operand dtype; S itself is never rounded
        S = state.to(g.dtype)
        for i in range(layout.C):
            starts[i] = S
            S = torch.addcmul(added[i], through[i], S)
        o = weights @ v + (q * p.head) @ starts
        return o, S, starts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, g, state, ctx.layout, ctx.exact, ctx.exclusive = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(q, k, v, g, output[2])
        ctx.state_dtype = state.dtype

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, g, starts = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        if dlast is None:
            dlast = starts.new_zeros(starts.shape[1:], dtype=g.dtype)
        with torch.autocast(q.device.type, enabled=False):
            grads = _backward(q, k, v, g, starts, do, dlast, ctx.layout, ctx.exact, ctx.exclusive)
        return *grads[:4], grads[4].to(ctx.state_dtype), None, None, None


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    starts: Tensor,
    do: Tensor,
    dlast: Tensor,
    layout: Chunks,
    exact: bool,
    exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the state."""
    p = _parts(q, k, g, layout, exact, exclusive)
    through = layout.across(p.c, g.dtype)
    weights = layout.lower(p.qe @ p.ke.mT, strict=exclusive).to(q.dtype)
    dweights = layout.lower(do @ v.mT, strict=exclusive)

    # chunk to chunk, backwards: what reaches the state after each chunk
    dstarts = (q * p.head).mT @ do
    dends = torch.empty_like(dstarts)
    dS = dlast.to(g.dtype)
    for i in reversed(range(layout.C)):
        dends[i] = dS
        dS = torch.addcmul(dstarts[i], through[i], dS)
    dthrough = (dends * starts).sum(-1, dtype=g.dtype) * through[..., 0]  # [C, B, H, K]

    dv = weights.mT @ do + (k * p.tail) @ dends
    dtailed = (v @ dends.mT) * p.tail
    dpairs = dweights.to(p.qe.dtype)
    dq = (dpairs @ p.ke).mul_(p.eq) + (do @ starts.mT).mul_(p.head)
    dk = (dpairs.mT @ p.qe).mul_(p.ek) + dtailed
    dcq = q * dq.to(g.dtype)
    dc = dcq - k * dk.to(g.dtype)
    dc[..., -1, :] += dthrough + (k * dtailed).sum(-2, dtype=g.dtype)
    dg = layout.running_sum_backward(dc)
    if exclusive:
        dg -= dcq
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg, dS
