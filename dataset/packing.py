"""From documents to rows of `context` ids. Any row is found in O(log n); nothing is stored per row.

Shape legend: b rows  C context  N documents in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset.files import DatasetError
from dataset.format import Split


class Arrays(NamedTuple):
    """Rows as numpy arrays.

    tokens:     [b, C] of the dtype asked for.
    cu_seqlens: int32 [N+1] over the flattened b*C; row starts are boundaries; padding is a run of its own.
    lengths:    int64 [b], ids that are no padding (they come first in a row), or None: no padding.
    mask:       u8 [b, C] from `.msk`, or None.
    side:       float32 [b, C] from `.wgt`, or None.
    """

    tokens: np.ndarray
    cu_seqlens: np.ndarray
    lengths: np.ndarray | None = None
    mask: np.ndarray | None = None
    side: np.ndarray | None = None


class ConcatRows:
    """Concatenate all documents and cut every C ids: row r holds ids r*C .. (r+1)*C of the split.

    rows, dropped_tokens: the ids after the last whole row are dropped, fewer than C an epoch.
    """

    def __init__(self, split: Split, context: int) -> None:
        self.split, self.context = split, context
        self.rows = split.tokens // context
        self.dropped_tokens = split.tokens - self.rows * context
        if not self.rows:
            raise DatasetError(
                f"{split.dataset.path}: split {split.name!r} has {split.tokens:,} ids, fewer than one row of "
                f"context {context:,}. Use a shorter context or more text"
            )
        self._masks, self._sides = split.has("msk"), split.has("wgt")

    def read(self, rows: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        """Rows by number, [b] -> Arrays."""
        b, C = len(rows), self.context
        tokens = np.empty((b, C), dtype)
        mask = np.empty((b, C), np.uint8) if self._masks else None
        side = np.empty((b, C), np.float32) if self._sides else None
        bounds = []
        firsts = rows * C
        shards = np.searchsorted(self.split.starts, firsts, "right") - 1
        for i, (first, s) in enumerate(zip(firsts.tolist(), shards.tolist())):
            at, base = 0, i * C
            bounds.append(np.array([base], np.int64))
            while at < C:
                shard = self.split.shards[s]
                lo = first + at - int(self.split.starts[s])
                hi = min(lo + C - at, shard.tokens)
                here = slice(at, at + hi - lo)
                tokens[i, here] = shard.tok[lo:hi]
                if mask is not None:
                    mask[i, here] = shard.msk[lo:hi]
                if side is not None:
                    side[i, here] = shard.wgt[lo:hi]
                # searchsorted would copy the map for keys of another type
                j = shard.end.searchsorted(np.uint32(lo), "right")
                k = shard.end.searchsorted(np.uint32(hi), "right" if at + hi - lo < C else "left")
                if j < k:
                    bounds.append(shard.end[j:k].astype(np.int64) + (base + at - lo))
                at += hi - lo
                s += 1
        bounds.append(np.array([b * C], np.int64))
        return Arrays(tokens, np.concatenate(bounds).astype(np.int32), None, mask, side)
