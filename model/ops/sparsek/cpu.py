"""SparseK attention in chunks: linear in T, and the same code for a whole row and for one token.

Shape legend: B batch  T time  Q tokens of a chunk  H query heads  G key/value heads  R = H/G  K key width
              M slots  W window  S = M + W-1 + Q keys of a chunk: slots, the window before it, its own
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.attention.places import Places
from model.ops.sparsek.gates import Sizes, SparseKState, gates

CHUNK = 128


def sparsek_cpu(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, *, sizes: Sizes, at: Places, carried: Tensor,
    state: SparseKState | None = None,
) -> tuple[Tensor, SparseKState | None]:  # fmt: skip
    """See `sparsek`."""
    T = q.shape[1]
    held = SparseKState.empty(k, v, u, sizes) if state is None else state
    parts = []
    with torch.autocast(q.device.type, enabled=False):
        for a in range(0, T, CHUNK):
            b = min(a + CHUNK, T)
            here = Places(*(p[:, a:b] for p in at))
            keys = _Keys(held, (k[:, a:b], v[:, a:b], u[:, a:b]), here, carried, sizes)
            parts.append(_attend(q[:, a:b], keys, here, sizes))
            if state is not None or b < T:
                held, carried = keys.after(here)
    y = torch.cat(parts, 1) if parts else q.new_zeros(*q.shape[:3], v.shape[-1])
    if state is None:
        return y, None
    return y, held if parts else SparseKState(*(t.clone() for t in state))


def sparsek_flops(T: int, heads: int, width: int, sizes: Sizes) -> int:
    """Forward FLOPs of one row of T tokens, masked products included; K = V = width."""
    chunks = [min(CHUNK, T - a) for a in range(0, T, CHUNK)]
    return sum(4 * heads * width * Q * (sizes.slots + sizes.window - 1 + Q) for Q in chunks)


class _Keys:
    """What the queries of a chunk may look at: k, v [B, S, G, *], u [B, S, G], at: Places [B, S]."""

    def __init__(
        self, held: SparseKState, new: tuple[Tensor, ...], at: Places, carried: Tensor, sizes: Sizes
    ) -> None:
        self.sizes, self.carried, self.seen = sizes, carried, held.seen
        olds, nears = held[:3], held[3:6]
        self.k, self.v, self.u = (
            torch.cat([o.to(n.dtype), w.to(n.dtype), n], 1) for o, w, n in zip(olds, nears, new)
        )
        M, W = sizes.slots, sizes.window
        slot = torch.arange(M, device=carried.device).expand(len(carried), M)
        place = held.seen[:, None] + torch.arange(1 - W, 0, device=carried.device)
        before = (held.seen - W + 1)[:, None]  # tokens that have left the window
        mine = carried[:, None]
        segments = torch.where(slot < before, mine, -1), torch.where(place >= 0, mine, -1), at.segments
        # Where a slot's token stood is forgotten; it lies before every window.
        self.at = Places(
            torch.cat([(before - 1).expand_as(slot), place, at.positions], 1), torch.cat(segments, 1)
        )

    def after(self, at: Places) -> tuple[SparseKState, Tensor]:
        """The state after the chunk, and the document that it belongs to."""
        M, W = self.sizes.slots, self.sizes.window
        real = at.segments >= 0
        index = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).amax(1, keepdim=True)
        some, index = index[:, 0] >= 0, index.clamp_min(0)
        carried = torch.where(some, at.segments.gather(1, index)[:, 0], self.carried)
        seen = torch.where(some, at.positions.gather(1, index)[:, 0] + 1, self.seen)
        mine, left = self.at.segments == carried[:, None], self.at.positions <= (seen - W)[:, None]
        near = mine & ~left
        order = near[:, M:].long().argsort(dim=1, stable=True)[:, near.shape[1] - M - (W - 1) :] + M
        row = torch.arange(len(order), device=order.device)[:, None]
        full = near.gather(1, order)
        nears = [_masked(t[row, order], full) for t in (self.k, self.v, self.u)]

        far = (mine & left)[:, :, None].expand_as(self.u)
        best = _sorted(self.u.detach().masked_fill(~far, -torch.inf), 1)[:, :M]
        # Back into the order of the document: of equal scores the earlier one is the better one later, too.
        best = torch.where(far.gather(1, best), best, far.shape[1]).sort(1).values
        there, best = best < far.shape[1], best.clamp_max(far.shape[1] - 1)
        group = torch.arange(best.shape[2], device=best.device)
        slots = [_masked(t[row[..., None], best, group], there) for t in (self.k, self.v, self.u)]
        return SparseKState._make([*slots, *nears, seen]), carried


def _masked(t: Tensor, there: Tensor) -> Tensor:
    return torch.where(there.view(*there.shape, *[1] * (t.dim() - there.dim())), t, 0)


def _sorted(t: Tensor, dim: int) -> Tensor:
    """Indices of the largest first; of equals the earlier."""
    return torch.sort(t, dim=dim, descending=True, stable=True).indices


def _attend(q: Tensor, keys: _Keys, at: Places, sizes: Sizes) -> Tensor:
    Q, K = q.shape[1], q.shape[3]
    G, M, W = keys.k.shape[2], sizes.slots, sizes.window
    mine = (at.segments[:, :, None] == keys.at.segments[:, None]) & (at.segments >= 0)[:, :, None]
    distance = at.positions[:, :, None] - keys.at.positions[:, None]
    near = (mine & (distance >= 0) & (distance < W))[:, None]  # [B, 1, Q, S]
    far = mine & (distance >= W)
    # A key W places back stands at least W indices back, so only these can be outside a window.
    ahead = M + Q - 1
    p = _gates(keys.u[:, :ahead], far[:, :, :ahead], sizes)  # [B, G, Q, ahead]
    p = torch.cat([p, p.new_zeros(*p.shape[:3], keys.k.shape[1] - ahead)], -1)
    wide = p.dtype
    groups = q.unflatten(2, (G, -1))
    logits = torch.einsum("bqgrk,bsgk->bgrqs", groups, keys.k).to(wide) * K**-0.5
    seen = (near | (p.detach() > 0))[:, :, None]
    weights = logits.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
    weights = weights * torch.where(near, 1.0, p)[:, :, None]
    y = torch.einsum("bgrqs,bsgv->bqgrv", weights.to(keys.v.dtype), keys.v)
    return y.flatten(2, 3)


def _gates(u: Tensor, far: Tensor, sizes: Sizes) -> Tensor:
    """u [B, n, G], far [B, Q, n] -> p [B, G, Q, n]: the operator on the M best of each query's own."""
    there = far[:, None]  # [B, 1, Q, n]
    u = u.transpose(1, 2)[:, :, None].expand(-1, -1, far.shape[1], -1)
    best = _sorted(u.detach().masked_fill(~there, -torch.inf), -1)[..., : sizes.slots]
    p = gates(u.gather(-1, best), there.expand_as(u).gather(-1, best), sizes.keep)
    return torch.zeros_like(u).scatter(-1, best, p)
