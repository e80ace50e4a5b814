"""Where groups of K tokens lie in a call: documents, padding and tokens carried from earlier calls.

Shape legend: B batch  T time outside  G groups (time inside)  K tokens of a group

Token p of a document is in its group p // K. A group is made in the call that brings its last token; some
of its members may then stand in the state. Everything here is indices: no values, no parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.core import Docs, count_tokens, positions_of


class Layout(NamedTuple):
    """Indices of one call. "Tokens" are the K-1 pending ones of the state followed by the call's own.

    members [B, G, K]: tokens of each group.      groups [B]: groups that a row makes; the rest is padding.
    read    [B, T]:    what each position reads: 0 nothing, 1 the newest group of the state, g+2 group g.
    pending [B, K-1], held [B, K-1]: tokens to keep, right-aligned, and which of these slots are in use.
    seen    [B]:       tokens of the row's last document so far.
    docs:              documents as the inside sees them; None: every row goes on by G positions.
    """

    members: Tensor
    groups: Tensor
    read: Tensor
    pending: Tensor
    held: Tensor
    seen: Tensor
    docs: Docs | None


def whole_rows(T: int, K: int, device: torch.device) -> Tensor:
    """`Layout.read` [T] of rows that are one document each and have no state."""
    made = (torch.arange(T, device=device) + 1) // K
    return torch.where(made > 0, made + 1, 0)


def make_layout(
    docs: Docs | None, seen: Tensor | None, K: int, B: int, T: int, device: torch.device
) -> Layout:
    """The layout of a call of B rows of T tokens.

    seen: [B] int64, tokens that the carried documents have had; None without a state. A state makes G
    the most groups of a row, which must be asked of the device; without one it is T // K.
    """
    time = torch.arange(T, device=device)
    position = positions_of(docs, seen, B, T, device)
    real = docs.tokens if docs is not None else torch.ones(B, T, dtype=torch.bool, device=device)
    start = time - docs.positions if docs is not None else time.new_zeros(B, T)
    ends = real & ((position + 1) % K == 0)
    made = ends.cumsum(1)
    groups = ends.sum(1)
    G = T // K if seen is None else int(groups.max()) if B else 0
    end = time.new_zeros(B, G + 1).scatter_(1, torch.where(ends, made - 1, G), time.expand(B, T))[:, :G]
    valid = torch.arange(G, device=device) < groups[:, None]

    back = torch.arange(K - 1, -1, -1, device=device)
    members = _source(end[..., None], back, start.gather(1, end)[..., None] if G else end[..., None], K)
    read = torch.where(real & (position >= K - 1), made + 1, 0)
    count = count_tokens(docs, seen, B, T, device)
    return Layout(
        members,
        groups,
        read,
        _pending(real, start, K),
        back[1:] < (count % K)[:, None],
        count,
        _inner_docs(docs, seen, K, position, end, valid),
    )


def _source(at: Tensor, back: Tensor, start: Tensor, K: int) -> Tensor:
    """Index among the tokens of the one `back` before `at`, whose document starts at `start` in this call."""
    index = at - back
    # What lies before the document's start is pending, right-aligned, so padding in between is skipped.
    return (K - 1 + torch.where(index >= start, index, index - start)).clamp_min(0)


def _pending(real: Tensor, start: Tensor, K: int) -> Tensor:
    """[B, K-1] indices of the last K-1 tokens of each row's last document."""
    B, T = real.shape
    keep = torch.arange(K - 1, device=real.device).expand(B, K - 1)
    if T == 0:
        return keep
    last = T - 1 - real.flip(1).int().argmax(1, keepdim=True)
    back = torch.arange(K - 2, -1, -1, device=real.device)
    return torch.where(real.any(1, keepdim=True), _source(last, back, start.gather(1, last), K), keep)


def _inner_docs(
    docs: Docs | None, seen: Tensor | None, K: int, position: Tensor, end: Tensor, valid: Tensor
) -> Docs | None:
    """Documents of the groups. One that has made no group yet has no state inside, whatever lies there."""
    if docs is None and seen is None:
        return None
    B, G = end.shape
    stale = None if seen is None else (seen > 0) & (seen < K)
    if docs is None and bool(valid.all()) and not bool(stale.any()):  # type: ignore[union-attr]
        return None
    outer = docs if docs is not None else Docs.whole(B, position.shape[1], position.device)
    carried = torch.arange(B, device=end.device) if docs is None else docs.first_segment()
    segments = torch.where(valid, outer.segments.gather(1, end), -1) if G else end
    place = position.gather(1, end) // K if G else end
    if seen is not None:
        place = place - (segments == carried[:, None]) * (seen // K)[:, None]
        carried = torch.where(stale, -2, carried)  # type: ignore[arg-type]
    inner = Docs.from_segments(segments, place * valid)
    return inner if seen is None else replace(inner, carried=carried)
