"""The last few items of a document, carried from call to call: the state of heads that look back or lag.

Shape legend: B batch  T new items  P items kept  S = P + T

Padding may stand before, after and between the documents of a row. What was kept is set right before the
row's first token, so that neighbours in the spliced row are neighbours in the document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.core import Docs


class History(NamedTuple):
    """x [B, P, D]: the last P items of each row's document, right-aligned; held [B] int64: how many are."""

    x: Tensor
    held: Tensor


class Splice(NamedTuple):
    """A call's row with the past in front.

    source:   [B, S] int64: index into [past, new].
    segments: [B, S] int64: document; -1 is nothing.
    """

    source: Tensor
    segments: Tensor

    def take(self, past: Tensor, new: Tensor) -> Tensor:
        """[B, S, ...] from past [B, P, ...] and new [B, T, ...]."""
        both = torch.cat([past, new], dim=1)
        index = self.source.view(*self.source.shape, *[1] * (both.dim() - 2))
        return both.gather(1, index.expand(-1, -1, *both.shape[2:]))


def empty_history(batch: int, like: Tensor, items: int, width: int) -> History:
    held = torch.zeros(batch, dtype=torch.int64, device=like.device)
    return History(like.new_zeros(batch, items, width), held)


def splice(past: History | None, segments: Tensor, carried: Tensor) -> Splice:
    """segments [B, T] of the new items; carried [B]: the document that the past belongs to."""
    B, T = segments.shape
    if past is None:
        return Splice(torch.arange(T, device=segments.device).expand(B, T), segments)
    P = past.x.shape[1]
    slot = torch.arange(P + T, device=segments.device).expand(B, P + T)
    real = segments != -1
    pad = (real.int().argmax(1) if T else slot.new_zeros(B))[:, None]
    kept = (slot >= pad) & (slot < pad + P)
    source = torch.where(slot < pad, slot + P, torch.where(kept, slot - pad, slot))
    old = torch.where(slot[:, :P] >= P - past.held[:, None], carried[:, None], -1)
    return Splice(source, torch.cat([old, segments], 1).gather(1, source))


def tail(x: Tensor, segments: Tensor, items: int) -> History:
    """The last `items` of each row's last document, of x [B, S, D] and segments [B, S]."""
    B, S = segments.shape
    slot = torch.arange(S, device=x.device)
    last = torch.where(segments != -1, slot, -1).amax(1) if S else slot.new_full((B,), -1)
    index = last[:, None] - items + 1 + torch.arange(items, device=x.device)
    safe = index.clamp_min(0)
    found = segments.gather(1, safe) if S else safe - 2
    valid = (index >= 0) & (found == found[:, -1:]) & (last >= 0)[:, None]
    kept = x.gather(1, safe[..., None].expand(-1, -1, x.shape[2])) if S else x.new_zeros(B, items, x.shape[2])
    return History(kept * valid[..., None], valid.sum(1))


def segments_of(docs: Docs | None, B: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(segments [B, T], [B] the document that a state belongs to)."""
    if docs is not None:
        return docs.segments, docs.first_segment()
    rows = torch.arange(B, device=device)
    return rows[:, None].expand(B, T), rows


def docs_of_runs(segments: Tensor, carried: Tensor) -> Docs:
    """Documents from segments [B, S] alone: positions are counted from the start of each run."""
    B, S = segments.shape
    slot = torch.arange(S, device=segments.device).expand(B, S)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(new, slot, 0).cummax(1).values if S else slot
    docs = Docs.from_segments(segments, (slot - start) * (segments != -1))
    return Docs(docs.positions, docs.segments, docs.cu_seqlens, docs.max_len, docs.padded, carried)
