"""Native sparse attention in batched matmuls.

Shape legend: B batch  T queries  S keys  C pooled keys  H query heads  G key/value heads  R = H/G
              K key width  V value width  n blocks read  Z blocks of the longest document

The selected branch has two forms. `dense`: SDPA under a mask, slices of queries against the keys up to the
slice's end. `gathered`: each query's n blocks are copied beside each other; its work does not grow with S.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.attention.places import Places, visible
from model.ops.dtypes import at_least_fp32
from model.ops.nsa.grid import Grid

SLICE = 256  # queries of a dense slice
# Gathered from so many times more keys on than a query reads. With 256 read and gradients, 1024 tokens take
# 0.14 s dense and 0.89 s gathered, 2048 take 0.38 and 1.7: they meet near 12k. A single query only reads.
GATHER, GATHER_ONE = 48, 2
ROOM = 1 << 22  # numbers that a gathered slice may copy


def nsa_cpu(
    q: Tensor, k: Tensor, v: Tensor, pooled: Any, *, grid: Grid, at: Places, key_at: Places,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nsa`."""
    if q.numel() == 0:
        empty = q.new_zeros(*q.shape[:3], v.shape[-1])
        return empty, empty.clone()
    with torch.autocast(q.device.type, enabled=False):
        near, weights = _pooled(q, pooled, at)
        chosen, there = _select(weights, pooled.number, grid, at, k.shape[1])
        times = GATHER_ONE if q.shape[1] == 1 else GATHER
        if base is not None and k.shape[1] > times * grid.reads * grid.block:
            far = _gathered(q, k, v, chosen, there, grid, at, base)
        else:
            far = _dense(q, k, v, chosen, there, grid, at, key_at)
        return near, far


def nsa_flops(T: int, heads: int, width: int, grid: Grid) -> int:
    """Forward FLOPs of both branches over one row of T tokens in one document; K = V = width."""
    C = max(0, (T - grid.pool) // grid.stride + 1)
    flops = (4 if C > 1 else 2) * heads * width * T * C  # einsum multiplies a sum over one key elementwise
    reach = grid.block * min(grid.reads, -(-T // grid.block))
    if GATHER * grid.reads * grid.block < T:
        return flops + 4 * heads * width * T * reach
    return flops + sum(
        4 * heads * width * (min(a + SLICE, T) - a) * min(a + SLICE, T) for a in range(0, T, SLICE)
    )


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the last dimension of what is seen; a row that sees nothing is 0, and so its gradient."""
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) * seen


def _pooled(q: Tensor, pooled: Any, at: Places) -> tuple[Tensor, Tensor]:
    """The pooled branch [B, T, H, V], and the weights of each group [B, G, T, C] without a gradient.

    In fp32 even for bf16 inputs: the weights choose, and a choice does not forgive rounding.
    """
    B, T, H, K = q.shape
    C, G = pooled.k.shape[1:3]
    if C == 0:
        return q.new_zeros(B, T, H, pooled.v.shape[-1]), q.new_zeros(B, G, T, 0)
    wide = at_least_fp32(q.dtype)
    groups = q.to(wide).unflatten(2, (G, -1)) * K**-0.5
    logits = torch.einsum("btgrk,bcgk->bgrtc", groups, pooled.k.to(wide))
    weights = _softmax(logits, visible(at, pooled.at, None)[:, None, None])
    y = torch.einsum("bgrtc,bcgv->btgrv", weights, pooled.v.to(wide))
    return y.flatten(2, 3).to(q.dtype), weights.detach().sum(2)


def _select(weights: Tensor, number: Tensor, grid: Grid, at: Places, S: int) -> tuple[Tensor, Tensor]:
    """Blocks of its own document that a query reads [B, G, T, n], and which of them are there."""
    B, G, T, C = weights.shape
    Z = -(-S // grid.block)
    score = weights.new_zeros(B, G, T, Z)
    for cell in range(grid.pool // grid.stride):  # a pooled key lies in the blocks of its cells of a stride
        block = ((number + cell) // (grid.block // grid.stride)).clamp(0, Z - 1)
        score.scatter_add_(3, block[:, None, None].expand(B, G, T, C), weights)
    own = torch.div(at.positions, grid.block, rounding_mode="floor")[:, None, :, None]
    block = torch.arange(Z, device=weights.device)
    score = score.masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
    score = score.masked_fill(block > own, -torch.inf)
    chosen = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., : grid.reads]
    return chosen, (chosen <= own) & (at.segments >= 0)[:, None, :, None]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, there: Tensor, grid: Grid, at: Places, key_at: Places
) -> Tensor:
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    block = torch.div(key_at.positions, grid.block, rounding_mode="floor").clamp_min(0)[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    parts = []
    for a in range(0, T, SLICE):
        b = min(a + SLICE, T)
        end = b if S == T else S  # the keys are the queries' own tokens: what follows the slice is its future
        picked, real = chosen[:, :, a:b], there[:, :, a:b]
        reads = picked.new_zeros(B, G, b - a, -(-S // grid.block), dtype=torch.bool).scatter_(3, picked, real)
        queries = Places(*(p[:, a:b] for p in at))
        mask = reads.gather(3, block[..., :end].expand(B, G, b - a, end))
        mask = mask & visible(queries, Places(*(p[:, :end] for p in key_at)), None)[:, None]
        mask = mask.repeat_interleave(H // G, dim=1)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, :end], v[:, :, :end], mask, enable_gqa=H != G
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, there: Tensor, grid: Grid, at: Places, base: Tensor
) -> Tensor:
    B, T, _, K = q.shape
    S, G = k.shape[1:3]
    wide, n = at_least_fp32(q.dtype), chosen.shape[3] * grid.block
    step = max(1, ROOM // (B * G * n * K))
    row = torch.arange(B, device=q.device)[:, None, None, None]
    group = torch.arange(G, device=q.device)[:, None, None]
    inside = torch.arange(grid.block, device=q.device)
    groups = q.unflatten(2, (G, -1)).transpose(1, 2)  # [B, G, T, R, K]
    parts = []
    for a in range(0, T, step):
        b = min(a + step, T)
        place = chosen[:, :, a:b, :, None] * grid.block + inside
        seen = there[:, :, a:b, :, None] & (place <= at.positions[:, None, a:b, None, None])
        index = (base[:, None, a:b, None, None] + place).flatten(3).clamp(0, S - 1)
        keys, values = k[row, index, group], v[row, index, group]  # [B, G, t, n block, K]
        logits = torch.einsum("bgtrk,bgtsk->bgtrs", groups[:, :, a:b], keys).to(wide) * K**-0.5
        weights = _softmax(logits, seen.flatten(3)[:, :, :, None])
        parts.append(torch.einsum("bgtrs,bgtsv->bgtrv", weights.to(values.dtype), values))
    return torch.cat(parts, 2).transpose(1, 2).flatten(2, 3)
