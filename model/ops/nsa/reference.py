"""Native sparse attention query by query: what the fast form must equal.

Shape legend: B batch  T queries  S keys  C pooled keys  H query heads  G key/value heads  V value width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.ops.attention.places import Places
from model.ops.dtypes import at_least_fp32
from model.ops.nsa.grid import Grid


def nsa_reference(
    q: Tensor, k: Tensor, v: Tensor, pooled: Any, *, grid: Grid, at: Places, key_at: Places,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nsa`. Sums in fp32, or fp64 for fp64 inputs; blocks are told by positions alone."""
    B, T, H, _ = q.shape
    G, V = k.shape[2], v.shape[-1]
    wide = at_least_fp32(q.dtype)
    near, far = [], []
    for b in range(B):
        for t in range(T):
            p, segment = int(at.positions[b, t]), int(at.segments[b, t])
            for g in range(G):
                heads = q[b, t, g * (H // G) : (g + 1) * (H // G)].to(wide)
                if segment < 0:
                    near.append(heads.new_zeros(len(heads), V))
                    far.append(heads.new_zeros(len(heads), V))
                    continue
                mine = (pooled.at.segments[b] == segment) & (pooled.at.positions[b] <= p)
                y, weights = _attend(heads, pooled.k[b, mine, g], pooled.v[b, mine, g])
                near.append(y)
                blocks = _blocks(weights.detach().sum(0), pooled.at.positions[b, mine], p, grid)
                reads = (key_at.segments[b] == segment) & (key_at.positions[b] <= p)
                reads &= torch.isin(key_at.positions[b] // grid.block, blocks)
                far.append(_attend(heads, k[b, reads, g], v[b, reads, g])[0])
    return tuple(
        torch.stack(x).view(B, T, H, V).to(q.dtype) if x else q.new_zeros(B, T, H, V) for x in (near, far)
    )  # type: ignore[return-value]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [R, K], k [n, K], v [n, V] -> [R, V] and the weights [R, n]."""
    weights = (q @ k.to(q.dtype).mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v.to(q.dtype), weights


def _blocks(weights: Tensor, ends: Tensor, p: int, grid: Grid) -> Tensor:
    """Numbers of the blocks that the query at position p reads; weights and ends [n] of the pooled keys."""
    own = p // grid.block
    scores = []
    for j in range(own + 1):
        first = (ends - grid.pool + 1).clamp_min(j * grid.block)
        last = ends.clamp_max((j + 1) * grid.block - 1)
        share = (last - first + 1).clamp_min(0) / grid.stride
        scores.append(float((weights * share).sum()) if j not in (0, own - 1, own) else torch.inf)
    order = sorted(range(own + 1), key=lambda j: -scores[j])
    return torch.tensor(order[: grid.reads], device=ends.device)
