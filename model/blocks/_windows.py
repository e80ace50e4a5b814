"""Windows of `length` tokens, one every `stride`, in each document: under pooled blocks and summaries.

Shape legend: B batch  T time  N windows of a call  L tokens of a window

Window c of a document covers its tokens [c stride, c stride + length). It is made in the call that brings
its last token; its other tokens may then stand in the state. Everything here is indices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.core import Docs, count_tokens, positions_of
from model.ops.attention import Places


class Windows(NamedTuple):
    """Windows that a call finishes, and those of the carried document that were finished before.

    members [B, N, L]: indices among "tokens", the L - 1 newest of the state followed by the call's own T.
    number  [B, N]:    place of each window among those of its document.
    at:     Places [B, N] of each window's last token; segment -1 where a row has fewer windows.
    carried [B]:       the document that the state belongs to.
    before  [B], after [B]: finished windows of the carried document before the call, of the last one after.
    goes_on [B] bool:  the last document is the carried one.
    """

    members: Tensor
    number: Tensor
    at: Places
    carried: Tensor
    before: Tensor
    after: Tensor
    goes_on: Tensor


def finished(tokens: Tensor, length: int, stride: int) -> Tensor:
    """How many windows that many tokens of a document finish."""
    return (torch.div(tokens - length, stride, rounding_mode="floor") + 1).clamp_min(0)


def most(tokens: int, length: int, stride: int) -> int:
    """The same for a number."""
    return max(0, (tokens - length) // stride + 1)


def make_windows(
    docs: Docs | None, seen: Tensor | None, length: int, stride: int, B: int, T: int, device: torch.device
) -> Windows:
    """seen: [B] tokens that the carried document of each row has had; None without a state."""
    time = torch.arange(T, device=device)
    position = positions_of(docs, seen, B, T, device).expand(B, T)
    if docs is None:
        segments, start = torch.zeros_like(position), torch.zeros_like(position)
    else:
        segments, start = docs.segments, time - docs.positions
    past = position + 1 - length
    ends = (segments >= 0) & (past >= 0) & (past % stride == 0)
    count = ends.sum(1)
    N = most(T, length, stride) if seen is None else int(count.max()) if B else 0
    rank = torch.where(ends, ends.cumsum(1) - 1, N)
    end = time.new_zeros(B, N + 1).scatter_(1, rank, time.expand(B, T))[:, :N] if T else time.new_zeros(B, N)
    used = torch.arange(N, device=device) < count[:, None]

    back = torch.arange(length - 1, -1, -1, device=device)
    if N:
        index, first = end[..., None] - back, start.gather(1, end)[..., None]
        # What lies before the document's start is in the state, right-aligned, whatever padding is between.
        members = (length - 1 + torch.where(index >= first, index, index - first)).clamp_min(0)
        number, where = past.gather(1, end) // stride, position.gather(1, end)
        segment = torch.where(used, segments.gather(1, end), -1)
    else:
        members, number, where, segment = end[..., None].expand(B, 0, length), end, end, end
    zero = torch.zeros(B, dtype=torch.int64, device=device)
    carried = zero if docs is None else docs.first_segment()
    last = zero if docs is None else docs.last_segment()
    before = zero if seen is None else finished(seen, length, stride)
    after = finished(count_tokens(docs, seen, B, T, device), length, stride)
    goes_on = (last == carried) | (last == -2)
    return Windows(members, number, Places(where, segment), carried, before, after, goes_on)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, S, ...], index [B, ...] -> [B, *index.shape[1:], ...]."""
    B = tokens.shape[0]
    row = torch.arange(B, device=tokens.device).view(B, *[1] * (index.dim() - 1))
    return tokens[row, index]


def newest(cache: Tensor, seen: Tensor, count: int) -> Tensor:
    """The last `count` tokens before place seen [B] of cache [B, S, ...], right-aligned, else 0."""
    if cache.shape[1] == 0 or count == 0:
        return cache.new_zeros(cache.shape[0], count, *cache.shape[2:])
    place = seen[:, None] + torch.arange(-count, 0, device=cache.device)
    held = (place >= 0).view(*place.shape, *[1] * (cache.dim() - 2))
    return torch.where(held, take(cache, place.clamp(0, cache.shape[1] - 1)), 0)


def places_seen(windows: Windows, slots: int, length: int, stride: int) -> tuple[Tensor, Places]:
    """Number and Places, each [B, slots + N], of what a state of so many slots holds, then the call's."""
    slot = torch.arange(slots, device=windows.before.device).expand(len(windows.before), slots)
    held = torch.where(slot < windows.before[:, None], windows.carried[:, None], -1)
    number = torch.cat([slot, windows.number], 1)
    ends = torch.cat([slot * stride + length - 1, windows.at.positions], 1)
    return number, Places(ends, torch.cat([held, windows.at.segments], 1))


def store(old: Tensor, new: Tensor, windows: Windows, slots: int) -> Tensor:
    """[B, slots, ...]: the windows of each row's last document, slot c holding window c; empty ones are 0.

    old [B, M, ...] as this function returned it, new [B, N, ...] in the order of `windows`.
    """
    B, M = old.shape[:2]
    slot = torch.arange(slots, device=old.device).expand(B, slots)
    kept = torch.where(windows.goes_on, windows.before, 0)[:, None]
    count = (windows.at.segments >= 0).sum(1)[:, None]
    made = windows.after[:, None] - kept  # the newest of the row
    source = torch.where(slot < kept, slot, M + count - made + slot - kept)
    held = slot < windows.after[:, None]
    both = torch.cat([old, new.to(old.dtype)], 1)
    if both.shape[1] == 0:
        return old.new_zeros(B, slots, *old.shape[2:])
    picked = take(both, torch.where(held, source, 0))
    return torch.where(held.view(B, slots, *[1] * (old.dim() - 2)), picked, 0)
