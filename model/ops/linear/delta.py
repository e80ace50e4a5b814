"""The delta rule, plain, gated and per-channel gated, in chunks: DeltaNet, Gated DeltaNet, KDA.

Shape legend: B batch  T time  H heads  K key width  V value width  C chunks  Q tokens of a chunk.
Chunked tensors are [C, B, H, Q, .]; see `chunks` for documents and `decay` for exact decays.

With c the running sum of the log decays, D_ij = e^(c_i - c_j), S the state before the chunk, and
A_ij = beta_i (k_i . D_ij k_j) for j < i, the corrections that the tokens of a chunk make to one another
are one unit-triangular system (WY form, Yang et al. 2024, https://arxiv.org/abs/2406.06484, gated:
https://arxiv.org/abs/2412.06464, per channel: https://arxiv.org/abs/2510.26692):

    (I + A) [u | w] = beta [v | k e^c]          solved once for all chunks
    n  = u - w S                                what each token writes
    o  = (q e^c) S + (q . D k) n
    S' = e^(c_Q) S + (k e^(c_Q - c))^T n

Only n and S' wait for one another, chunk by chunk. The backward pass is written by hand. As in `gla`, a
log decay enters only as e^(+c) beside q and k in rows and as e^(-c) beside k in columns, so its gradient
is q dq + k dk_rows - k dk_columns, and at the end of a chunk what the state carries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.ops.documents import Documents, zero_padding
from model.ops.dtypes import LOG2_E, at_least_fp32
from model.ops.linear.chunks import Chunks, operand
from model.ops.linear.decay import EXACT_CHUNK, factors, running_sum

DELTA_CHUNK = 64
NOTHING = -1e3  # a log decay that leaves nothing in any precision; keeps -inf - -inf away


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    beta: Tensor,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the state [B, H, K, V]; arguments as in `delta_rule`."""
    B, T, H, K = q.shape
    acc = at_least_fp32(v.dtype)
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1], dtype=acc)
    if T == 0 or B == 0:
        return v.clone(), state.to(acc, copy=True)
    q, k, v, beta = zero_padding(docs, q, k, v, beta)
    layout = Chunks.of(T, _chunk(g is not None and g.dim() == 4), docs, q.device)
    with torch.autocast(q.device.type, enabled=False):
        qc, kc, vc = (layout.split(x, operand(v.dtype)) for x in (q * scale, k, v))
        bc = layout.split(beta[..., None], acc)
        gc = None
        if g is not None:
            (g,) = zero_padding(docs, g)
            gc = layout.split(g if g.dim() == 4 else g[..., None], acc)
        if T == 1:
            o, last = _one_step(qc, kc, vc, gc, bc, layout.owned(state.to(acc)))
        else:
            o, last = _ChunkedDelta.apply(qc, kc, vc, gc, bc, state, layout)[:2]
        return layout.join(o).to(v.dtype), last


def delta_flops(T: int, H: int, K: int, V: int, per_channel: bool = False) -> int:
    """Forward matmul flops (a multiply-add is 2) of one row of `delta_chunked`, without the
    triangular solve, which is Q^2 (K + V) a chunk and which torch's counter leaves out too."""
    if T <= 1:
        return 0
    Q = min(_chunk(per_channel), T)
    C = -(-T // Q)
    return 2 * C * H * (2 * Q * Q * K + Q * Q * V + 3 * Q * K * V)


def _chunk(per_channel: bool) -> int:
    return EXACT_CHUNK if per_channel else DELTA_CHUNK


def _one_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """T = 1, the decoding step: no matmul is worth its dispatch. Arguments are [1, B, H, 1, .]."""
    qt, kt = q[0].mT.to(S.dtype), k[0].mT.to(S.dtype)  # [B, H, K, 1]
    if g is not None:
        S = g[0].mT.exp() * S
    written = beta[0] * (v[0].to(S.dtype) - (kt * S).sum(2, keepdim=True))
    S = torch.addcmul(S, kt, written)
    return (qt * S).sum(2, keepdim=True)[None], S


class _Pairs(NamedTuple):
    """What the decays of a chunk are made of; `c` in fp64, because its differences are taken, and strong
    decays would drown the small ones in fp32."""

    c: Tensor | None  # [C, B, H, Q, K or 1] running sums
    left: Tensor | None  # [C, B, H, Q, Q] decay from j to i, one a head
    eq: Tensor | None  # [C, B, H, Q, K] in fp64, pair factors of per-channel decays
    ek: Tensor | None

    @staticmethod
    def of(g: Tensor | None, layout: Chunks) -> _Pairs:
        if g is None:
            return _Pairs(None, None, None, None)
        if g.shape[-1] > 1:
            _, c = running_sum(g, layout, exact=True)
            return _Pairs(c, None, *factors(c, c, True, g.dtype))
        c = layout.running_sum(g.double().clamp_min(NOTHING))
        powers = c * LOG2_E
        left = (powers - powers.mT).to(g.dtype).masked_fill(~layout.causal, -torch.inf).exp2()
        return _Pairs(c, left, None, None)

    def scores(self, q: Tensor, k: Tensor, layout: Chunks) -> tuple[Tensor, Tensor]:
        """Decayed scores [C, B, H, Q, Q] of q and of k against k; above the diagonal anything."""
        rows, columns = torch.stack([q, k], 3), k
        if self.eq is not None and self.ek is not None:
            rows, columns = rows * self.eq[:, :, :, None], k * self.ek
        pairs = (rows.flatten(3, 4) @ columns.mT).unflatten(3, (2, layout.Q))
        if self.left is not None:
            pairs = pairs * self.left[:, :, :, None]
        return pairs[:, :, :, 0], pairs[:, :, :, 1]

    def backward(self, q: Tensor, k: Tensor, dreads: Tensor, dkeys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q and k as rows, and of k as columns, from those of the scores."""
        both, rows, columns = torch.stack([dreads, dkeys], 3), torch.stack([q, k], 3), k
        if self.eq is not None and self.ek is not None:
            rows, columns = rows * self.eq[:, :, :, None], k * self.ek
        if self.left is not None:
            both = both * self.left[:, :, :, None]
        both = both.to(columns.dtype).flatten(3, 4)
        drows = (both @ columns).unflatten(3, (2, -1))
        dcolumns = both.mT @ rows.flatten(3, 4)
        if self.eq is not None and self.ek is not None:
            drows, dcolumns = drows * self.eq[:, :, :, None], dcolumns * self.ek
        dq, dk = drows.unbind(3)
        return dq, dk, dcolumns


class _Edges(NamedTuple):
    """Decays to and from the states at a chunk's edges; see `Chunks`. Wide dtype."""

    head: Tensor | None  # [C, B, H or 1, Q, K or 1]
    tail: Tensor | None
    across: Tensor | None  # [C, B, H or 1, K or 1, 1]

    @staticmethod
    def of(c: Tensor | None, layout: Chunks, acc: torch.dtype) -> _Edges:
        if c is not None:
            return _Edges(layout.at_head(c, acc), layout.to_tail(c, acc), layout.across(c, acc))
        return _Edges(*(m if m is None else m.to(acc) for m in (layout.head, layout.tail, layout.keep)))


def _times(x: Tensor, decay: Tensor | None) -> Tensor:
    return x if decay is None else (x * decay).to(x.dtype)


class _ChunkedDelta(torch.autograd.Function):
    """Chunked q, k, v in the operand dtype; g, beta [C, B, H, Q, K or 1] and the state at least fp32.

    Gives o and the last state, and for backward, what was solved and written, and the states before the
    chunks.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, layout: Chunks
    ) -> tuple[Tensor, ...]:
        acc, V = beta.dtype, v.shape[-1]
        pairs = _Pairs.of(g, layout)
        edges = _Edges.of(pairs.c, layout, acc)
        reads, keys = pairs.scores(q, k, layout)
        keys = layout.lower(keys, strict=True).to(acc)
        right = torch.cat([v, _times(k, edges.head)], -1).to(acc) * beta
        solved = torch.linalg.solve_triangular(keys * beta, right, upper=False, unitriangular=True)
        u, w = solved[..., :V], solved[..., V:].to(q.dtype)
        kt = _times(k, edges.tail)
        written, starts = torch.empty_like(v), q.new_empty(layout.C, *state.shape)
        S = state.to(acc)
        for i in range(layout.C):
            starts[i] = S
            torch.sub(u[i], w[i] @ starts[i], out=written[i])
            added = kt[i].mT @ written[i]
            S = S + added if edges.across is None else torch.addcmul(added, edges.across[i], S)
        o = layout.lower(reads).to(q.dtype) @ written + _times(q, edges.head) @ starts
        return o, S, keys, solved, written, starts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, g, beta, state, ctx.layout = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(q, k, v, g, beta, *output[2:])
        ctx.state_dtype = state.dtype

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, keys, solved, written, starts = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        if dlast is None:
            dlast = starts.new_zeros(starts.shape[1:], dtype=beta.dtype)
        with torch.autocast(q.device.type, enabled=False):
            grads = _backward(q, k, v, g, beta, keys, solved, written, starts, do, dlast, ctx.layout)
        return *grads[:5], grads[5].to(ctx.state_dtype), None


def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, keys: Tensor, solved: Tensor,
    written: Tensor, starts: Tensor, do: Tensor, dlast: Tensor, layout: Chunks,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, beta and the state."""
    acc, op, V = beta.dtype, q.dtype, v.shape[-1]
    pairs = _Pairs.of(g, layout)
    edges = _Edges.of(pairs.c, layout, acc)
    w, kt, kh = solved[..., V:].to(op), _times(k, edges.tail), _times(k, edges.head)
    reads = layout.lower(pairs.scores(q, k, layout)[0]).to(op)

    # chunk to chunk, backwards: what reaches n, and the state after each chunk
    du = reads.mT @ do
    dstarts = _times(q, edges.head).mT @ do
    dends = torch.empty_like(starts)
    dS = dlast.to(acc)
    for i in reversed(range(layout.C)):
        dends[i] = dS
        du[i] += kt[i] @ dends[i]
        reached = dstarts[i] - w[i].mT @ du[i]
        dS = reached + dS if edges.across is None else torch.addcmul(reached, edges.across[i], dS)

    # the triangular system
    dsolved = torch.cat([du, -(du @ starts.mT)], -1).to(acc)
    system = (keys * beta).mT
    dright = torch.linalg.solve_triangular(system, dsolved, upper=True, unitriangular=True)
    dsystem = -layout.lower(dright @ solved.mT, strict=True)
    dbeta = (dsystem * keys).sum(-1, keepdim=True)
    dbeta += (dright[..., :V] * v).sum(-1, keepdim=True) + (dright[..., V:] * kh).sum(-1, keepdim=True)
    dright = dright * beta

    dreads = layout.lower(do @ written.mT)
    dq, drows, dcolumns = pairs.backward(q, k, dreads, dsystem * beta)
    dq = dq + _times(do @ starts.mT, edges.head)
    drows = drows + _times(dright[..., V:], edges.head)
    dtailed = _times(written @ dends.mT, edges.tail)
    dcolumns = dcolumns + dtailed
    dg = None
    if g is not None:
        assert edges.across is not None
        carried = (dends.to(acc) * starts).sum(-1, keepdim=True) * edges.across
        dg = _gate_gradient(q * dq.to(acc) + k * (drows.to(acc) - dcolumns), k * dtailed, carried, g, layout)
    dk = (drows + dcolumns).to(op)
    return dq.to(op), dk, dright[..., :V].to(op), dg, dbeta, dS


def _gate_gradient(dc: Tensor, dtailed: Tensor, carried: Tensor, g: Tensor, layout: Chunks) -> Tensor:
    """dg from the decays' gradients in rows and columns, towards the chunk's end, and of the state.

    dc, dtailed: [C, B, H, Q, K]; carried: [C, B, H, K, 1]. Summed over K when g has one decay a head.
    """
    last = dtailed.to(g.dtype).sum(3, keepdim=True) + carried.mT
    dc = dc.to(g.dtype)
    if g.shape[-1] == 1:
        dc, last = dc.sum(-1, keepdim=True), last.sum(-1, keepdim=True)
    dc[:, :, :, -1:] += last
    return layout.running_sum_backward(dc)
