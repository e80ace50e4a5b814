"""Pairwise compression with selective expansion: the mathematics, without loops and differentiable.

A stream of T tokens is a memory of L tokens and a window of the last T_w. The memory's pairs (2i, 2i+1) each
become one vector; the n most important pairs come back as their two originals, in order:

    n = min(floor(r P + M (1 - r) / 2), P),  P = L / 2,  length P + n + T_w, about T - (1 - r)(L - M) / 2

r = 1 or M >= L gives the stream back. An odd memory hands its last token to the window: nothing is lost.

Shape legend: B batch  T time  P pairs  n selected pairs  d width  H heads  W window (rows of queries).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # r P + M (1 - r) / 2 may fall just short of a whole number in floating point


def window_length(length: Tensor, T_w: int) -> Tensor:
    """Window of rows of `length` [B]: the last T_w, one more if the memory would be odd; all of a short
    row."""
    memory = (length - T_w).clamp_min(0)
    return length - memory + memory % 2


def selected_count(pairs: Tensor, r: float, M: float) -> Tensor:
    """n for `pairs` [B]. Raises ValueError unless 0 <= r <= 1 and M >= 0."""
    if not 0 <= r <= 1 or M < 0:
        raise ValueError(f"r={r}, M={M}: r lies between 0 and 1, M is not negative")
    wanted = (pairs * r + M * (1 - r) / 2 + EPSILON).floor().long()
    return torch.minimum(wanted, pairs)


def pair_up(x: Tensor) -> Tensor:
    """Memory [..., 2P, d] -> [..., P, 2, d]."""
    return x.unflatten(-2, (-1, 2))


def importance(q: Tensor, k: Tensor, scale: float, asking: Tensor, there: Tensor) -> Tensor:
    """How much the window attends to each pair: softmax over pairs, summed over queries, averaged over heads.

    q [B, H, W, K] window queries, k [B, H, P, K] keys of the pairs, asking bool [B, W], there bool [B, P]
    -> [B, P]; pairs that are not there get 0.
    """
    logits = (q @ k.transpose(-1, -2)).float() * scale
    low = torch.finfo(logits.dtype).min
    weights = logits.masked_fill(~there[:, None, None, :], low).softmax(-1)
    return (weights * asking[:, None, :, None]).sum(2).mean(1) * there


def select(scores: Tensor, n: Tensor, there: Tensor) -> Tensor:
    """The n [B] best pairs of each row as bool [B, P]; of equals the earlier."""
    order = scores.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < n[:, None]) & there


def expand(pairs: Tensor, compressed: Tensor, selected: Tensor, gate: Tensor | None = None) -> Tensor:
    """Originals where selected, the compressed vector elsewhere, on the grid of places.

    pairs [B, ..., P, 2, d], compressed [B, ..., P, d], selected bool [B, P] -> [B, ..., 2P, d]; the second
    place of
    a pair that is not selected holds nothing of use (`places` leaves it out).
    gate: [B, P] in place of the hard 0 / 1, for straight-through scores.
    """
    shape = (selected.shape[0], *(1,) * (compressed.dim() - 3), selected.shape[1], 1)
    chosen = selected.view(shape)
    if gate is None:
        first = torch.where(chosen, pairs[..., 0, :], compressed)
    else:
        first = compressed + gate.view(shape).to(compressed.dtype) * (pairs[..., 0, :] - compressed)
    return torch.stack([first, pairs[..., 1, :]], -2).flatten(-3, -2)


def places(selected: Tensor, there: Tensor) -> Tensor:
    """bool [B, 2P]: which places of the grid are used."""
    return torch.stack([there, selected & there], -1).flatten(-2)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gather index int64 [B, S] of the kept places of [B, N], in order, and mask bool [B, S]; S the most of
    any row."""
    counts = keep.sum(1)
    S = int(counts.max()) if counts.numel() else 0
    order = (~keep).long().argsort(dim=1, stable=True)[:, :S]
    return order, torch.arange(S, device=keep.device) < counts[:, None]


def straight_through(scores: Tensor, selected: Tensor, there: Tensor) -> Tensor:
    """[B, P] whose value is the hard selection and whose gradient is that of sigmoid(log-score minus its
    cut).

    The cut lies halfway between the last pair selected and the first one left out.
    """
    log = scores.clamp_min(1e-9).log()
    inside = log.masked_fill(~selected, float("inf")).amin(1, keepdim=True)
    outside = log.masked_fill(selected | ~there, float("-inf")).amax(1, keepdim=True)
    cut = torch.where(inside.isinf(), outside, torch.where(outside.isinf(), inside, (inside + outside) / 2))
    soft = torch.sigmoid(log - torch.where(cut.isinf(), 0.0, cut).detach()) * there
    return selected.to(soft.dtype) + (soft - soft.detach())
