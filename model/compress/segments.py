"""Cutting rows into segments: by each row's own length, at given columns, or at random.

Shape legend: B batch  T time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.compress.caches import window_of
from model.compress.rows import pack


def row_segments(
    ids: Tensor, mask: Tensor, counts: Tensor, lengths: Sequence[int] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Packed rows [B, T] cut into `counts` [B] segments each: of `lengths` where a row has exactly that many
    segments and tokens, near equal elsewhere. A row's later segments may be empty."""
    which = window_of(mask, counts)
    if lengths:
        fits = (mask.sum(1) == sum(lengths)) & (counts == len(lengths))
        ends = torch.tensor(lengths, device=ids.device).cumsum(0)
        given = torch.searchsorted(ends, torch.arange(ids.shape[1], device=ids.device), right=True)
        which = torch.where(fits[:, None], given, which)
    n = int(counts.max()) if counts.numel() else 0
    out = []
    for j in range(n):
        part, keep = pack(ids, mask & (which == j) & (j < counts)[:, None])
        out.append((part, keep))
    return out


def given_segments(ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Columns [B, T] cut into segments of `lengths`. Raises ValueError unless they add up to T,
    each at least 1."""
    if sum(lengths) != ids.shape[1] or any(n < 1 for n in lengths):
        raise ValueError(
            f"segment_lengths {list(lengths)} must be positive and add up to the {ids.shape[1]} columns given"
        )
    return list(zip(ids.split(list(lengths), 1), mask.split(list(lengths), 1)))


def random_segments(total: int, n: int, longest: int, generator: torch.Generator | None = None) -> list[int]:
    """n random lengths that add up to `total`, each at most `longest` and at least
    max(ceil((total - longest) / (n - 1)), 2), or total // n where that is less.

    Raises ValueError when no such lengths exist.
    """
    if n * 2 > total or n * longest < total:
        raise ValueError(f"{total} tokens cannot be cut into {n} segments of 2 to {longest} tokens")
    if n == 1:
        return [total]
    least = min(max(-(-(total - longest) // (n - 1)), 2), total // n)
    left, out = total, []
    for rest in range(n - 1, 0, -1):
        low, high = max(least, left - rest * longest), min(longest, left - rest * least)
        out.append(int(torch.randint(low, high + 1, (1,), generator=generator)))
        left -= out[-1]
    return [*out, left]
