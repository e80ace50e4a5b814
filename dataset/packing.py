"""From documents to rows of `context` ids: arithmetic for plain concatenation, a stored plan for the rest.

Shape legend: b rows  C context  S segments (runs of ids inside one shard)  N documents in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset.files import DatasetError
from dataset.format import Split
from dataset.pieces import Pieces
from dataset.sidecar import Sidecar


class Arrays(NamedTuple):
    """Rows as numpy arrays.

    tokens:     [b, C] of the dtype asked for.
    cu_seqlens: int32 [N+1] over the flattened b*C; row starts are boundaries; padding is a run of its own.
    lengths:    int64 [b], ids that are no padding (they come first in a row), or None: no padding.
    mask:       u8 [b, C] from `.msk`, or None.
    side:       float32 [b, C] from a sidecar, or None; 0 in padding.
    """

    tokens: np.ndarray
    cu_seqlens: np.ndarray
    lengths: np.ndarray | None = None
    mask: np.ndarray | None = None
    side: np.ndarray | None = None


class _Segments(NamedTuple):
    """Runs of ids to copy: into row `row` at column `at`, from shard `shard`, ids lo .. lo+n. All [S]."""

    row: np.ndarray
    at: np.ndarray
    shard: np.ndarray
    lo: np.ndarray
    n: np.ndarray


_Gathered = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


class Rows:
    """Rows of one split. Subclasses say which ids a row is made of.

    rows: an epoch's. dropped_tokens: ids left out. Masks and sidecar values follow their ids.
    """

    rows: int
    dropped_tokens: int

    def __init__(self, split: Split, context: int, sidecar: Sidecar | None = None) -> None:
        self.split, self.context, self.sidecar = split, context, sidecar
        self._eos = split.dataset.eos_id
        self._masks = split.has("msk")

    def _check(self, tokens: int) -> None:
        if not self.rows:
            raise DatasetError(
                f"{self.split.dataset.path}: split {self.split.name!r} has {tokens:,} ids for this view, "
                f"fewer than one row of context {self.context:,}. Use a shorter context or more text"
            )

    def _gather(self, b: int, s: _Segments, dtype, padded: bool) -> _Gathered:
        """(tokens, mask or None, side or None) of the segments."""
        C = self.context
        tokens = np.full((b, C), self._eos, dtype) if padded else np.empty((b, C), dtype)
        mask = np.zeros((b, C), np.uint8) if self._masks else None
        side = np.zeros((b, C), np.float32) if self.sidecar is not None else None
        shards = self.split.shards
        for row, at, k, lo, n in zip(*(column.tolist() for column in s)):
            to, take = slice(at, at + n), slice(lo, lo + n)
            tokens[row, to] = shards[k].tok[take]
            if mask is not None:
                mask[row, to] = shards[k].msk[take]
            if side is not None:
                side[row, to] = self.sidecar.values(shards[k])[take]  # type: ignore[union-attr]
        return tokens, mask, side

    def read(self, rows: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        """Rows by number, int64 [b] -> Arrays."""
        raise NotImplementedError  # pragma: no cover - abstract


class ConcatRows(Rows):
    """Concatenate all documents and cut every C ids: row r holds ids r*C .. (r+1)*C of the split.

    The ids after the last whole row are dropped, fewer than C an epoch.
    """

    def __init__(self, split: Split, context: int, sidecar: Sidecar | None = None) -> None:
        super().__init__(split, context, sidecar)
        self.rows = split.tokens // context
        self.dropped_tokens = split.tokens - self.rows * context
        self._check(split.tokens)

    def _segments(self, rows: np.ndarray) -> _Segments:
        starts, C = self.split.starts, self.context
        first = rows * C
        shard = np.searchsorted(starts, first, "right") - 1
        n = np.minimum(starts[shard + 1] - first, C)
        row = np.arange(len(rows))
        parts = [_Segments(row, np.zeros_like(row), shard, first - starts[shard], n)]
        at = n
        while (short := np.flatnonzero(at < C)).size:  # rows that go on in the next shard
            row, shard, at = row[short], shard[short] + 1, at[short]
            n = np.minimum(starts[shard + 1] - starts[shard], C - at)
            parts.append(_Segments(row, at, shard, np.zeros_like(at), n))
            at = at + n
        return parts[0] if len(parts) == 1 else _Segments(*map(np.concatenate, zip(*parts)))

    def read_tokens(self, rows: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        """[b, C] ids without their boundaries: for consumers that need none."""
        return self._gather(len(rows), self._segments(rows), dtype, padded=False)[0]

    def read(self, rows: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        segments = self._segments(rows)
        tokens, mask, side = self._gather(len(rows), segments, dtype, padded=False)
        cu = self._boundaries(len(rows), segments)
        return Arrays(tokens, cu, None, mask, side)

    def _boundaries(self, b: int, s: _Segments) -> np.ndarray:
        """Row starts, and the document starts inside the segments, by search in `.end`."""
        C = self.context
        found = [np.arange(b + 1, dtype=np.int64) * C]
        for k in np.unique(s.shard).tolist():
            here = s.shard == k
            lo, n, base = s.lo[here], s.n[here], s.row[here] * C + s.at[here]
            end = self.split.shards[k].end
            # keys of another type than the map's would make searchsorted copy the whole map
            i = end.searchsorted(lo.astype(np.uint32), "right")
            j = end.searchsorted((lo + n).astype(np.uint32), "right")
            count = j - i
            total = int(count.sum())
            if total:
                skip = np.repeat(i - (np.cumsum(count) - count), count)
                inner = end[skip + np.arange(total)].astype(np.int64)
                found.append(inner + np.repeat(base - lo, count))
        return np.unique(np.concatenate(found)).astype(np.int32)


class PlannedRows(Rows):
    """Rows made of stored pieces: best-fit packing, documents as rows, concatenation of chosen documents.

    A row's pieces come one after another, the rest of the row is padding (EOS ids).
    """

    def __init__(self, split: Split, context: int, pieces: Pieces, sidecar: Sidecar | None = None) -> None:
        super().__init__(split, context, sidecar)
        self._pieces = pieces
        self.rows = pieces.rows
        self.dropped_tokens = pieces.dropped_tokens
        self._check(split.tokens - self.dropped_tokens)

    @property
    def padding(self) -> float:
        """Fraction of an epoch's columns that are padding."""
        return 1 - (self.split.tokens - self.dropped_tokens) / (self.rows * self.context)

    def read(self, rows: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        b, C = len(rows), self.context
        first, stop = self._pieces.first[rows], self._pieces.first[rows + 1]
        count = (stop - first).astype(np.int64)
        index = np.repeat(first.astype(np.int64) - (np.cumsum(count) - count), count) + np.arange(count.sum())
        start = self._pieces.start[index].astype(np.int64)
        n = self._pieces.length[index].astype(np.int64)
        row = np.repeat(np.arange(b), count)
        before = np.cumsum(n) - n
        lengths = np.bincount(row, n, b).astype(np.int64)
        at = before - (np.cumsum(lengths) - lengths)[row]
        shard = np.searchsorted(self.split.starts, start, "right") - 1
        segments = _Segments(row, at, shard, start - self.split.starts[shard], n)
        tokens, mask, side = self._gather(b, segments, dtype, padded=True)
        bounds = np.concatenate([row * C + at, np.arange(b + 1) * C, np.arange(b) * C + lengths])
        padded = lengths if (lengths < C).any() else None
        return Arrays(tokens, np.unique(bounds).astype(np.int32), padded, mask, side)
