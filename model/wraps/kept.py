"""Tokens that a bracket keeps: where they stand in the call, and their documents as the inside sees them.

Shape legend: B batch  T time outside  N kept tokens of the fullest row (time inside)

Rows keep different numbers of tokens, so the inside is padded on the right. Everything here is indices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.core import Ctx, Docs, count_tokens, docs_of, positions_of


class Counts(NamedTuple):
    """seen [B] int64: tokens of the row's document so far. kept [B] int64: those that were kept."""

    seen: Tensor
    kept: Tensor


class Kept(NamedTuple):
    """places [B, N]: where in the call each kept token stands. valid [B, N]: False is padding.

    ctx:    of the inside: documents of kept tokens alone, and their positions in the whole documents.
    counts: after the call; None without a state.
    """

    places: Tensor
    valid: Tensor
    ctx: Ctx
    counts: Counts | None

    def gather(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, N, D]."""
        return x.gather(1, self.places[..., None].expand(-1, -1, x.shape[-1]))

    def scatter(self, code: Tensor, T: int) -> Tensor:
        """code [B, N, D] -> [B, T, D], zero where no token was kept."""
        place = torch.where(self.valid, self.places, T)[..., None].expand_as(code)
        return code.new_zeros(code.shape[0], T + 1, code.shape[2]).scatter(1, place, code)[:, :T]


def no_counts(batch: int, device: torch.device) -> Counts:
    zero = torch.zeros(batch, dtype=torch.int64, device=device)
    return Counts(zero, zero.clone())


def keep_tokens(keep: Tensor, counts: Counts | None, ctx: Ctx | None) -> Kept:
    """What follows from keep [B, T] bool, False for padding.

    counts: of the first document of each row, from the last call; None without a state.
    """
    B, T = keep.shape
    device = keep.device
    docs, seen = docs_of(ctx), None if counts is None else counts.seen
    outer = docs if docs is not None else Docs.whole(B, T, device)
    time = torch.arange(T, device=device).expand(B, T)
    ends = keep.cumsum(1)
    total = ends[:, -1] if T else ends.sum(1)
    N = int(total.max()) if B and T else 0
    rank = torch.where(keep, ends - 1, N)
    index = torch.zeros(B, N + 1, dtype=torch.int64, device=device).scatter_(1, rank, time)[:, :N]
    valid = torch.arange(N, device=device) < total[:, None]

    before = ends - keep.long()
    place = before - before.gather(1, time - outer.positions)  # kept ones before it, of its document
    segments = torch.where(valid, outer.segments.gather(1, index), -1)
    inner = Docs.from_segments(segments, place.gather(1, index) * valid)
    if counts is not None:
        # A document that has kept nothing yet has no state inside, whatever lies there.
        carried = torch.where(counts.kept > 0, outer.first_segment(), -2)
        inner = replace(inner, carried=carried)
    ctx = ctx or Ctx()
    places = positions_of(docs, seen, B, T, device).expand(B, T) if ctx.places is None else ctx.places
    inside = replace(ctx, docs=inner, places=places.gather(1, index) * valid, memory=None)
    return Kept(index, valid, inside, None if counts is None else _after(keep, counts, docs, outer))


def _after(keep: Tensor, counts: Counts, docs: Docs | None, outer: Docs) -> Counts:
    last = outer.last_segment()
    goes_on = (last == outer.first_segment()) | (last == -2)
    kept = ((outer.segments == last[:, None]) & keep).sum(1) + counts.kept * goes_on
    return Counts(count_tokens(docs, counts.seen, keep.shape[0], keep.shape[1], keep.device), kept)
