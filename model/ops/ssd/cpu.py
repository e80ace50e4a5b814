"""The state-space dual in chunks of batched matmuls, with a backward pass written by hand.

Shape legend: B batch  T time  H heads  P head width  G groups  R = H/G heads of a group  N state width
              C chunks  Q tokens of a chunk (T = C Q).

With L the running sum of log_a inside a chunk, S the state before it, and every exponent <= 0:

    y_i = sum_{j<=i} e^(L_i - L_j) (c_i . b_j) x_j  +  e^(L_i) c_i . S          intra + inter
    U   = sum_j e^(L_Q - L_j) b_j (x) x_j                                        what the chunk adds
    S'  = e^(L_Q) S + U                                                          all chunks in one matmul

(Dao & Gu 2024, https://arxiv.org/abs/2405.21060.) c.b is made once per group, not per head. Matmul
operands are bf16 when x is, decays are fp32, and fp64 stays fp64. Decays are summed in fp64: a token that
forgets everything (log_a = -50) leaves a sum whose fp32 rounding would outlive it. Only inputs and the states
between chunks are kept for backward; decays are made again. A document that starts inside a chunk is a
mask on every term that would cross its start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.documents import Documents
from model.ops.dtypes import LOG2_E, at_least_fp32

NOTHING = -1000.0  # exp of it is 0 in fp64 too; lower decays, -inf above all, would make sums inexact


def ssd_chunked(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, P] and the state [B, H, N, P] after the last token; arguments as in `ssd`."""
    B, T, H, P = x.shape
    N, dtype = b.shape[3], x.dtype
    if T == 0 or B == 0:
        wide = at_least_fp32(x.dtype)
        return x.clone(), x.new_zeros(B, H, N, P, dtype=wide) if state is None else state.to(wide, copy=True)
    if T == 1 and docs is None:
        return _one_step(x, log_a, b, c, state)
    operand = x.dtype if x.dtype in (torch.bfloat16, torch.float64) else torch.float32
    segments = first = None
    if docs is not None:
        segments, first = docs.segments, docs.first_segment()
        if docs.padded:  # whatever lies there, even NaN, must reach nothing
            here = (segments >= 0)[:, :, None]
            log_a = torch.where(here, log_a, 0)
            x, b, c = (torch.where(here[..., None], t, 0) for t in (x, b, c))
    Q = min(chunk, T)
    ragged = -T % Q
    if ragged:
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, ragged)) for t in (x, b, c))
        log_a = F.pad(log_a, (0, 0, 0, ragged))
        segments = None if segments is None else F.pad(segments, (0, ragged), value=-1)
    x, b, c = (t.to(operand) for t in (x, b, c))
    log_a = log_a.to(at_least_fp32(operand)).clamp_min(NOTHING)
    with torch.autocast(x.device.type, enabled=False):
        y, last, _ = _ChunkedSSD.apply(x, log_a, b, c, state, segments, first, Q, want_state)
    return (y[:, :T] if ragged else y).to(dtype), last


def ssd_flops(T: int, H: int, P: int, G: int, N: int, chunk: int = 64) -> int:
    """Forward matmul flops (a multiply-add is 2) of one row of `ssd_chunked` without a state."""
    if T <= 1:
        return 0
    Q = min(chunk, T)
    C = -(-T // Q)
    scores, intra = G * C * Q * Q * N, H * C * Q * Q * P
    chunk_states, inter = H * C * Q * N * P, H * C * Q * N * P
    carry = H * C * C * N * P
    return 2 * (scores + intra + chunk_states + carry + inter)


def _one_step(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """T = 1, the decoding step: no matmul is worth its dispatch."""
    wide, R = at_least_fp32(x.dtype), x.shape[2] // b.shape[2]
    bh, ch = (t[:, 0].to(wide).repeat_interleave(R, dim=1)[..., None] for t in (b, c))
    S = bh * x[:, 0, :, None, :].to(wide)
    if state is not None:
        S = torch.addcmul(S, log_a[:, 0, :, None, None].to(wide).exp(), state.to(wide))
    return (ch * S).sum(2)[:, None].to(x.dtype), S


class _Layout(NamedTuple):
    """Where terms would cross a document start. All of `docs` is None when every row is one document."""

    intra: Tensor  # [Q, Q] or [B, C, 1, Q, Q]: j reaches i
    carry: Tensor  # [C+1, C] or [B, 1, C+1, C]: what chunk j adds is alive before chunk i
    docs: _Masks | None


class _Masks(NamedTuple):
    segments: Tensor  # [B, C, Q]
    ends: Tensor  # [B, C] the document that owns the state after the chunk
    head: Tensor  # [B, C, Q, 1]: the state before the chunk reaches i
    tail: Tensor  # [B, C, Q, 1]: j reaches the state after the chunk
    init: Tensor  # [B, 1, C+1]: the state passed in is alive before chunk i
    through: Tensor  # [B, C, 1]: the state before the chunk reaches its end


def _layout(segments: Tensor | None, first: Tensor | None, C: int, Q: int, device: torch.device) -> _Layout:
    causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
    earlier = torch.ones(C + 1, C, dtype=torch.bool, device=device).tril(-1)
    if segments is None or first is None:
        return _Layout(causal, earlier, None)
    # The document that owns the state; at first the one to which the state passed in belongs.
    ends = torch.where(segments < 0, first[:, None], segments).cummax(1).values[:, Q - 1 :: Q]
    owners = torch.cat([first[:, None], ends], 1)  # [B, C+1]: before each chunk, and after the last
    s = segments.unflatten(1, (C, Q))
    masks = _Masks(
        s,
        ends,
        head=(s == owners[:, :-1, None])[..., None],
        tail=(s == ends[:, :, None])[..., None],
        init=(owners == first[:, None])[:, None],
        through=(owners[:, :-1] == ends)[..., None],
    )
    reach = causal & (s[..., :, None] == s[..., None, :]) & (s >= 0)[..., None, :]
    alive = earlier & (owners[:, :, None] == ends[:, None, :])
    return _Layout(reach[:, :, None], alive[:, None], masks)


def _sum_in_runs(t: Tensor, runs: Tensor) -> Tensor:
    """Running sums over dim -2 of t [..., n, H] that start anew where the id in runs [..., n] changes.

    By doubling: a difference of plain running sums would carry the rounding of one document into the next.
    """
    step, n = 1, t.shape[-2]
    while step < n:
        same = (runs[..., step:] == runs[..., :-step])[..., None]
        t = t + F.pad(torch.where(same, t[..., :-step, :], 0), (0, 0, step, 0))
        step *= 2
    return t


class _Decays(NamedTuple):
    """exp of sums of log_a: at most 1, and 0 where masked. The first three are matmul operands."""

    intra: Tensor  # [B, C, H, Q, Q] from j to i
    head: Tensor  # [B, C, Q, H, 1] from the state before the chunk to i
    tail: Tensor  # [B, C, Q, H, 1] from j to the state after the chunk
    carry: Tensor  # [B, H, C+1, C] from the end of chunk j to the start of chunk i
    init: Tensor  # [B, H, C+1] from the state passed in to the start of chunk i
    through: Tensor  # [B, C, H] across a chunk


def _decays(log_a: Tensor, layout: _Layout, C: int, Q: int, operand: torch.dtype) -> _Decays:
    wide = log_a.dtype
    a, docs = (log_a.double() * LOG2_E).unflatten(1, (C, Q)), layout.docs  # powers of two, see LOG2_E
    if docs is None:
        L = a.cumsum(2)  # [B, C, Q, H]
        total = L[:, :, -1]  # [B, C, H]
        after = total.cumsum(1)
    else:
        L = _sum_in_runs(a, docs.segments)
        total = (a * docs.tail).sum(2)
        after = _sum_in_runs(total * docs.through, docs.ends)
    Lh, after = L.transpose(2, 3), after.transpose(1, 2)
    intra = (Lh[..., :, None] - Lh[..., None, :]).to(wide).masked_fill_(~layout.intra, -torch.inf).exp2_()
    before = F.pad(after, (1, 0))  # [B, H, C+1]
    carry = (before[..., :, None] - after[..., None, :]).masked_fill_(~layout.carry, -torch.inf)
    carry, tail = carry.to(wide).exp2_(), (total[:, :, None] - L).to(wide)
    head, init, through = (t.to(wide).exp2() for t in (L, before, total))
    if docs is None:
        tail = tail.exp2()
    else:
        head, init, through = head * docs.head, init * docs.init, through * docs.through
        tail = tail.masked_fill(~docs.tail, -torch.inf).exp2()
    return _Decays(
        intra.to(operand), head[..., None].to(operand), tail[..., None].to(operand), carry, init, through
    )


def _by_head(t: Tensor, R: int) -> Tensor:
    """[B, C, G, N, R*P] -> [B, H, C, N*P]: every head's chunks beside each other."""
    return t.unflatten(4, (R, -1)).permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)


def _by_chunk(t: Tensor, R: int, N: int) -> Tensor:
    """The inverse of `_by_head`."""
    return t.unflatten(3, (N, -1)).unflatten(1, (-1, R)).permute(0, 3, 1, 4, 2, 5).flatten(4)


def _per_group(t: Tensor, C: int, G: int) -> Tensor:
    """[B, T, G or H, K] -> [B, C, G, Q, K or R*K]."""
    B, T = t.shape[:2]
    return t.reshape(B, C, T // C, G, -1).transpose(2, 3)


def _per_head(t: Tensor, C: int) -> Tensor:
    """[B, T, H, P] -> [B, C, H, Q, P]."""
    return t.unflatten(1, (C, -1)).transpose(2, 3)


class _ChunkedSSD(torch.autograd.Function):
    """T a multiple of Q; x, b, c in the operand dtype, log_a in fp32 or fp64."""

    @staticmethod
    def forward(
        x: Tensor,
        log_a: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor | None,
        segments: Tensor | None,
        first: Tensor | None,
        Q: int,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        B, T, H, P = x.shape
        G, N = b.shape[2:]
        C, R = T // Q, H // G
        d = _decays(log_a, _layout(segments, first, C, Q, x.device), C, Q, x.dtype)
        bg, cg = _per_group(b, C, G), _per_group(c, C, G)
        scores = cg @ bg.mT  # [B, C, G, Q, Q]
        weights = (d.intra.unflatten(2, (G, R)) * scores[:, :, :, None]).flatten(2, 3)
        intra = (weights @ _per_head(x, C)).transpose(2, 3)  # [B, C, Q, H, P]
        tailed = (x.unflatten(1, (C, Q)) * d.tail).flatten(1, 2)
        added = _by_head(bg.mT @ _per_group(tailed, C, G), R)  # [B, H, C, N*P]
        starts = d.carry[:, :, :C].to(x.dtype) @ added
        last = None
        if want_state:  # summed in fp32: a bf16 state would lose what it had, call after call
            last = (d.carry[:, :, C:] @ added.to(log_a.dtype)).view(B, H, N, P)
        if state is not None:
            flat = state.to(log_a.dtype).reshape(B, H, 1, N * P)
            starts = starts + (d.init[:, :, :C, None] * flat).to(x.dtype)
            if last is not None:
                last = last + d.init[:, :, C, None, None] * state
        starts = _by_chunk(starts, R, N)  # [B, C, G, N, R*P]
        inter = (cg @ starts).transpose(2, 3).reshape(B, C, Q, H, P)
        y = torch.addcmul(intra, inter, d.head)
        return y.reshape(B, T, H, P), last, starts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, log_a, b, c, state, segments, first, Q, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(x, log_a, b, c, segments, first, output[2])
        ctx.Q, ctx.state_dtype = Q, None if state is None else state.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, log_a, b, c, segments, first, starts = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        with torch.autocast(x.device.type, enabled=False):
            grads = _backward(x, log_a, b, c, segments, first, starts, dy, dlast, ctx.Q, ctx.state_dtype)
        return (*grads, None, None, None, None)


def _backward(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    segments: Tensor | None,
    first: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    Q: int,
    state_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, log_a, b, c and the state; dlast is None when nothing uses the final state."""
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    C, R = T // Q, H // G
    wide = log_a.dtype
    layout = _layout(segments, first, C, Q, x.device)
    d = _decays(log_a, layout, C, Q, x.dtype)
    bg, cg = _per_group(b, C, G), _per_group(c, C, G)
    dyc, xc = dy.unflatten(1, (C, Q)), x.unflatten(1, (C, Q))  # [B, C, Q, H, P]

    # inter: y += head * (c . S)
    headed = dyc * d.head
    dyg = _per_group(headed.flatten(1, 2), C, G)
    dc = dyg @ starts.mT
    inter = (cg @ starts).transpose(2, 3).reshape(B, C, Q, H, P)
    dL = (headed * inter).sum(-1, dtype=wide)  # [B, C, Q, H]

    # chunk to chunk
    dadded, dstate = _carry_backward(_by_head(cg.mT @ dyg, R), dlast, d, state_dtype, (N, P))
    dadded = _by_chunk(dadded, R, N)
    kept = (dadded * starts).view(B, C, G, N, R, P).sum((3, 5), dtype=wide).flatten(2)

    # U = sum_j tail_j b_j (x) x_j
    db = _per_group((xc * d.tail).flatten(1, 2), C, G) @ dadded.mT
    dx = (bg @ dadded).transpose(2, 3).reshape(B, C, Q, H, P) * d.tail
    into = (dx * xc).sum(-1, dtype=wide)
    dL -= into
    dtotal = (into.sum(2) + d.through * kept)[:, :, None]  # [B, C, 1, H]

    dx_intra, dL_intra, db_intra, dc_intra = _intra_backward(
        _per_head(x, C), bg, cg, _per_head(dy, C), d, wide
    )
    dx, dL, db, dc = dx + dx_intra, dL + dL_intra, db + db_intra, dc + dc_intra

    # L and the total are sums of log_a
    if layout.docs is None:
        dlog_a = dL.flip(2).cumsum(2).flip(2) + dtotal
    else:
        dlog_a = _sum_in_runs(dL.flip(2), layout.docs.segments.flip(2)).flip(2) + dtotal * layout.docs.tail
    db, dc = (t.transpose(2, 3).reshape(B, T, G, N) for t in (db, dc))
    return dx.reshape(B, T, H, P), dlog_a.reshape(B, T, H), db, dc, dstate


def _carry_backward(
    dstarts: Tensor,
    dlast: Tensor | None,
    d: _Decays,
    state_dtype: torch.dtype | None,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of what the chunks add and of the state through S_i = sum_j carry_ij U_j + init_i state.

    dstarts: [B, H, C, N*P].  dlast: [B, H, N, P].  shape: (N, P).  Returns dU, like dstarts, and dstate.
    """
    B, H, C, _ = dstarts.shape
    dadded = d.carry[:, :, :C].mT.to(dstarts.dtype) @ dstarts
    if dlast is not None:
        last = d.carry[:, :, C, :, None] * dlast.reshape(B, H, 1, -1)
        dadded = dadded + last.to(dstarts.dtype)
    if state_dtype is None:
        return dadded, None
    dstate = (d.init[:, :, None, :C] @ dstarts.to(d.init.dtype)).view(B, H, *shape)
    if dlast is not None:
        dstate = dstate + d.init[:, :, C, None, None] * dlast
    return dadded, dstate.to(state_dtype)


def _intra_backward(
    x: Tensor, b: Tensor, c: Tensor, dy: Tensor, d: _Decays, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, L, b and c through y_i = sum_{j<=i} intra_ij (c_i . b_j) x_j.

    x, dy: [B, C, H, Q, P].  b, c: [B, C, G, Q, N].
    Returns [B, C, Q, H, P], [B, C, Q, H] and twice b's shape.
    """
    G = b.shape[2]
    scores = (c @ b.mT)[:, :, :, None]  # [B, C, G, 1, Q, Q]
    intra = d.intra.unflatten(2, (G, -1))  # [B, C, G, R, Q, Q]
    dscaled = (dy @ x.mT).unflatten(2, (G, -1)) * intra
    dscores = dscaled.sum(3)
    dD = (dscaled * scores).flatten(2, 3)  # gradient of L_i - L_j
    dL = (dD.sum(-1, dtype=wide) - dD.sum(-2, dtype=wide)).transpose(2, 3)
    weights = (intra * scores).flatten(2, 3)
    dx = (weights.mT @ dy).transpose(2, 3)
    return dx, dL, dscores.mT @ c, dscores @ b
