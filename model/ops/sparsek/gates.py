"""The SparseK operator: scores to soft top-k gates; and what SparseK attention carries between calls.

Shape legend: B batch  G key/value heads  K key width  V value width  M slots  W window
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """keep: sum of the gates. slots: M, tokens held from before the window. window: W, with the query."""

    keep: int
    slots: int
    window: int

    def check(self) -> None:
        """Raises ValueError when the sizes do not fit each other."""
        if not 1 <= self.keep <= self.slots:
            raise ValueError(f"keep={self.keep}: at least 1 and at most slots={self.slots}")
        if self.window < 1:
            raise ValueError(f"window={self.window}: tokens, the query's own among them, at least 1")


class SparseKState(NamedTuple):
    """Of each row's last document. seen [B] int64: its tokens so far.

    k [B, M, G, K], v, u [B, M, G]: the best scores before the window, in the order of the document.
    near_k [B, W-1, G, K], near_v, near_u: the last W-1 tokens, right-aligned. Empty places are 0.
    """

    k: Tensor
    v: Tensor
    u: Tensor
    near_k: Tensor
    near_v: Tensor
    near_u: Tensor
    seen: Tensor

    @staticmethod
    def empty(k: Tensor, v: Tensor, u: Tensor, sizes: Sizes) -> SparseKState:
        """For k [B, any, G, K], v and u like it."""
        slots = [t.new_zeros(t.shape[0], sizes.slots, *t.shape[2:]) for t in (k, v, u)]
        near = [t.new_zeros(t.shape[0], sizes.window - 1, *t.shape[2:]) for t in (k, v, u)]
        seen = torch.zeros(len(k), dtype=torch.int64, device=k.device)
        return SparseKState._make([*slots, *near, seen])


def gates(u: Tensor, there: Tensor, keep: int) -> Tensor:
    """p = clip(u - tau, 0, 1) over the last dimension, sum p = keep; 0 where `there` is False.

    u descends; what is there comes first. All ones where no more than `keep` are there. Else, with F the
    scores strictly between the bounds and O those at one, tau = (sum_F u + |O| - keep) / |F|, whose gradient
    makes the Jacobian diag(f) - f f' / |f|.
    """
    if u.shape[-1] <= keep:
        return there.to(u.dtype)
    with torch.no_grad():
        count = there.sum(-1, keepdim=True)
        top = u[..., :1].masked_fill(~there[..., :1], 0.0)
        z = torch.where(there, u - top, -torch.inf)
        low = z.masked_fill(~there, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
        z = torch.where(there, z, low - 2)
        edges, order = torch.cat([z, z - 1], -1).sort(-1)
        sign = torch.where(order < z.shape[-1], 1.0, -1.0).to(z.dtype)
        # The sum of clip(z - x, 0, 1) at each edge x: it falls as x grows, linearly between two edges.
        slope = sign.flip(-1).cumsum(-1).flip(-1)
        total = (sign * edges).flip(-1).cumsum(-1).flip(-1) - edges * slope
        left = ((total >= keep).sum(-1, keepdim=True) - 1).clamp(0, edges.shape[-1] - 2)
        middle = (edges.gather(-1, left) + edges.gather(-1, left + 1)) / 2
        # A gap of 1 below the best `keep`: tau is free in it, and the gates are constants.
        first = torch.arange(z.shape[-1], device=z.device) < keep
        gap = (z[..., keep - 1 : keep] - 1 >= z[..., keep : keep + 1]) | (count <= keep)
        one = torch.where(gap, first, z - 1 >= middle) & there
        between = (z > middle) & there & ~one & ~gap
        number, ones = between.sum(-1, keepdim=True).clamp_min(1), one.sum(-1, keepdim=True)
    z = u - top
    tau = (torch.where(between, z, 0.0).sum(-1, keepdim=True) + ones - keep) / number
    return torch.where(between, z - tau, one.to(z.dtype))
