"""Where documents lie in a batch.

Shape legend: B batch  T time  N documents in the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Docs:
    """Where documents lie in a batch: one truth, several views of it.

    positions:  [B, T] int64, place of a token within its document, from 0.
    segments:   [B, T] int64, number of the document, counted over the whole batch and never
                decreasing along a row; -1 is padding: never read, never supervised.
    cu_seqlens: [N+1] int32, document ends over the flattened B*T, padding runs included as runs of
                their own; starts at 0, strictly increasing, ends at B*T; every row start is in it.
    max_len:    length of the longest document (padding runs not counted).
    padded:     whether any segment is -1.
    carried:    [B] int64, the document that a state belongs to that comes with a call; None: the first
                of each row. An id below those in the row (a shortened document may have no position
                left in this call): every document starts anew. A row of padding alone keeps its state.

    The carried document's positions go on from the state's own count; every other one starts anew.
    """

    positions: Tensor
    segments: Tensor
    cu_seqlens: Tensor
    max_len: int
    padded: bool = False
    carried: Tensor | None = None

    @staticmethod
    def packed(cu_seqlens: Tensor | Sequence[int], rows: int = 1) -> Docs:
        """Documents from their boundaries over `rows` rows of equal length.

        cu_seqlens: int [N+1], starts at 0 and ends at rows*T; repeated values (empty documents) are
        dropped, row starts are added.
        Raises ValueError when it does not start at 0, decreases, or does not divide into rows.
        """
        cu = torch.as_tensor(cu_seqlens)
        if cu.dim() != 1 or cu.numel() < 1 or (cu.numel() and int(cu[0]) != 0) or bool((cu.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu.tolist()}")
        total = int(cu[-1])
        if rows < 1 or total % rows:
            raise ValueError(f"cu_seqlens ends at {total}, which does not divide into {rows} rows")
        T = total // rows
        starts = torch.arange(rows, device=cu.device, dtype=torch.int64) * T
        bounds = torch.unique(
            torch.cat([cu.to(torch.int64), starts, cu.new_tensor([total], dtype=torch.int64)])
        )
        lengths = bounds.diff()
        n = lengths.numel()
        segments = torch.repeat_interleave(torch.arange(n, device=cu.device), lengths, output_size=total)
        positions = torch.arange(total, device=cu.device) - bounds[:-1][segments] if total else segments
        longest = int(lengths.max()) if n else 0
        return Docs(positions.view(rows, T), segments.view(rows, T), bounds.to(torch.int32), longest)

    @staticmethod
    def from_mask(mask: Tensor) -> Docs:
        """One document a row, padded: mask [B, T], nonzero where there is a token.

        The tokens of a row must be one unbroken run (left or right padding, or both).
        Raises ValueError otherwise.
        """
        keep = mask.to(torch.bool)
        B, T = keep.shape
        if T and bool(((keep[:, 1:] & ~keep[:, :-1]).sum(1) + keep[:, 0] > 1).any()):
            raise ValueError("a row's mask must be one unbroken run of tokens (left and right padding only)")
        rows = torch.arange(B, device=mask.device)[:, None].expand(B, T)
        segments = torch.where(keep, rows, -1)
        positions = (keep.long().cumsum(1) - 1).clamp_min(0) * keep
        return Docs.from_segments(segments, positions)

    @staticmethod
    def from_segments(segments: Tensor, positions: Tensor) -> Docs:
        """From the two [B, T] views alone (segment -1 is padding)."""
        B, T = segments.shape
        new = torch.ones_like(segments, dtype=torch.bool)
        if T:
            new[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = new.flatten().nonzero().flatten()
        cu = torch.cat([starts, starts.new_tensor([B * T])]) if T else starts.new_zeros(1)
        real = segments.flatten()[starts] >= 0
        lengths = cu.diff()[real] if T else cu[:0]
        longest = int(lengths.max()) if lengths.numel() else 0
        return Docs(positions, segments, cu.to(torch.int32), longest, padded=bool((segments < 0).any()))

    @staticmethod
    def whole(batch: int, time: int, device: torch.device | str | None = None) -> Docs:
        """Every row one document: what `ctx=None` means, spelled out."""
        seg = torch.arange(batch, device=device)[:, None].expand(batch, time)
        pos = torch.arange(time, device=device).expand(batch, time)
        cu = torch.arange(batch + 1 if time else 1, device=device, dtype=torch.int32) * time
        return Docs(pos, seg, cu, time)

    @property
    def tokens(self) -> Tensor:
        """[B, T] bool: not padding."""
        return self.segments >= 0

    def first_segment(self) -> Tensor:
        """[B] segment id of the document that a passed-in state belongs to; -2 in a row of padding alone,
        whose state goes on as it is."""
        if self.carried is None:
            return self._edge(first=True)
        return torch.where(self.tokens.any(1), self.carried, -2)

    def last_segment(self) -> Tensor:
        """[B] segment id of each row's last document (what the final state belongs to); -2 if none."""
        return self._edge(first=False)

    def _edge(self, first: bool) -> Tensor:
        B, T = self.segments.shape
        if T == 0:
            return self.segments.new_full((B,), -2)
        if not self.padded:
            return self.segments[:, 0 if first else -1]
        ids = self.segments if first else self.segments.flip(1)
        found = ids.gather(1, (ids >= 0).int().argmax(1, keepdim=True))[:, 0]
        return torch.where(found < 0, -2, found)

    def last_places(self) -> Tensor:
        """[B] index of each row's last token that is not padding; 0 in a row of padding. T >= 1."""
        places = torch.arange(self.segments.shape[1], device=self.segments.device)
        return torch.where(self.tokens, places, -1).amax(1).clamp_min(0)

    def to(self, device: torch.device | str) -> Docs:
        return replace(
            self,
            positions=self.positions.to(device),
            segments=self.segments.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            carried=None if self.carried is None else self.carried.to(device),
        )


def positions_of(docs: Docs | None, seen: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """Positions [B, T] int64 in each document, going on from a state.

    seen: [B] int64 tokens that the row's first document has already had, or None.
    """
    if docs is None:
        base = torch.arange(T, device=device).expand(B, T)
        return base if seen is None else base + seen[:, None]
    if seen is None:
        return docs.positions
    going_on = docs.segments == docs.first_segment()[:, None]
    return docs.positions + seen[:, None] * going_on


def count_tokens(docs: Docs | None, seen: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """[B] int64: tokens that each row's last document has had after this call (the next position)."""
    if docs is None:
        base = torch.full((B,), T, device=device, dtype=torch.int64)
        return base if seen is None else base + seen
    last = docs.last_segment()[:, None]
    n = (docs.segments == last).sum(1) if T else torch.zeros(B, device=device, dtype=torch.int64)
    if seen is None:
        return n
    return n + seen * ((last == docs.first_segment()[:, None]) | (last == -2))[:, 0]
