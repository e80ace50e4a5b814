"""From documents to rows of `context` ids: arithmetic for plain concatenation, a stored plan for the rest.

Shape legend: b rows  C context  N documents in the batch.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
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


# (row, column, shard, lo, n): ids lo .. lo+n of the shard go into the row from the column on. Plain tuples of
# plain numbers: for the few segments of a batch they are several times faster than arrays.
Segment = tuple[int, int, int, int, int]
_Gathered = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


class Rows(ABC):
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

    def _gather(self, b: int, segments: list[Segment], dtype, padded: bool) -> _Gathered:
        """(tokens, mask or None, side or None) of the segments."""
        shape, shards = (b, self.context), self.split.shards
        tokens = np.full(shape, self._eos, dtype) if padded else np.empty(shape, dtype)
        for row, at, k, lo, n in segments:
            tokens[row, at : at + n] = shards[k].tok[lo : lo + n]
        mask = side = None
        if self._masks:
            mask = np.zeros(shape, np.uint8)
            for row, at, k, lo, n in segments:
                mask[row, at : at + n] = shards[k].msk[lo : lo + n]
        if self.sidecar is not None:
            side = np.zeros(shape, np.float32)
            for row, at, k, lo, n in segments:
                side[row, at : at + n] = self.sidecar.values(shards[k])[lo : lo + n]
        return tokens, mask, side

    @abstractmethod
    def read(self, rows: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        """Rows by number, int64 [b] -> Arrays."""


class ConcatRows(Rows):
    """Concatenate all documents and cut every C ids: row r holds ids r*C .. (r+1)*C of the split.

    The ids after the last whole row are dropped, fewer than C an epoch.
    """

    def __init__(self, split: Split, context: int, sidecar: Sidecar | None = None) -> None:
        super().__init__(split, context, sidecar)
        self.rows = split.tokens // context
        self.dropped_tokens = split.tokens - self.rows * context
        self._check(split.tokens)
        self._starts = split.starts.tolist()

    def _one_shard(self, rows: np.ndarray) -> int | None:
        """Number of the shard in which all rows lie whole, as in a corpus of few shards; or None."""
        if not len(rows):
            return None
        numbers = rows.tolist()
        k = bisect.bisect_right(self._starts, min(numbers) * self.context) - 1
        return k if (max(numbers) + 1) * self.context <= self._starts[k + 1] else None

    def _take(self, k: int, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[b, C] of one of shard k's files, which is a matrix of whole rows after the end of a cut one."""
        C = self.context
        first = -(-self._starts[k] // C)  # the first row that begins in this shard
        skip = first * C - self._starts[k]
        shape = ((len(values) - skip) // C, C)
        matrix = np.ndarray(shape, values.dtype, values, skip * values.itemsize)
        return matrix.take(rows - first if first else rows, axis=0)

    def _segments(self, rows: np.ndarray) -> list[Segment]:
        starts, C = self._starts, self.context
        found = []
        for row, number in enumerate(rows.tolist()):
            first = number * C
            k = bisect.bisect_right(starts, first) - 1
            lo, left = first - starts[k], C
            while left:
                n = min(left, starts[k + 1] - starts[k] - lo)
                found.append((row, C - left, k, lo, n))
                left, k, lo = left - n, k + 1, 0
        return found

    def read_tokens(self, rows: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        """[b, C] ids without their boundaries: for consumers that need none."""
        if (k := self._one_shard(rows)) is not None:
            return self._take(k, self.split.shards[k].tok, rows).astype(dtype, copy=False)
        return self._gather(len(rows), self._segments(rows), dtype, padded=False)[0]

    def read(self, rows: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        if (k := self._one_shard(rows)) is not None:
            return self._read_one_shard(k, rows, dtype)
        segments = self._segments(rows)
        tokens, mask, side = self._gather(len(rows), segments, dtype, padded=False)
        return Arrays(tokens, self._boundaries(len(rows), segments), None, mask, side)

    def _read_one_shard(self, k: int, rows: np.ndarray, dtype: np.dtype | type) -> Arrays:
        """What `read` does by segments, with one gather a file: faster for a few short rows."""
        shard = self.split.shards[k]
        tokens = self._take(k, shard.tok, rows).astype(dtype, copy=False)
        mask = self._take(k, shard.msk, rows) if self._masks else None
        side = None
        if self.sidecar is not None:
            side = self._take(k, self.sidecar.values(shard), rows).astype(np.float32)
        return Arrays(
            tokens, _cuts(shard.end, rows * self.context - self._starts[k], self.context), None, mask, side
        )

    def _boundaries(self, b: int, segments: list[Segment]) -> np.ndarray:
        """Segment starts (all are row or document starts) and the document starts inside the segments."""
        cuts = self._inside(segments)
        counts = [1 + j - i for i, j in cuts]
        bounds = np.empty(sum(counts) + 1, np.int64)
        at = 0
        for (_, _, k, lo, _), (i, j), count in zip(segments, cuts, counts):
            bounds[at] = lo
            bounds[at + 1 : at + count] = self.split.shards[k].end[i:j]
            at += count
        shifts = [row * self.context + column - lo for row, column, _, lo, _ in segments]
        bounds[:-1] += np.repeat(np.array(shifts, np.int64), counts)
        bounds[-1] = b * self.context
        return bounds.astype(np.int32)

    def _inside(self, segments: list[Segment]) -> list[tuple[int, int]]:
        """For each segment, the range of documents that end inside it (not at its very end)."""
        found: list[tuple[int, int]] = [(0, 0)] * len(segments)
        by_shard: dict[int, list[int]] = {}
        for number, segment in enumerate(segments):
            by_shard.setdefault(segment[2], []).append(number)
        for k, numbers in by_shard.items():
            end = self.split.shards[k].end
            keys = [segments[s][3] for s in numbers] + [sum(segments[s][3:]) - 1 for s in numbers]
            # keys of another type than the map's would make searchsorted copy the whole map
            cuts = end.searchsorted(np.array(keys, end.dtype), "right").tolist()
            for number, cut in zip(numbers, zip(cuts, cuts[len(numbers) :])):
                found[number] = cut
        return found


def _cuts(end: np.ndarray, first: np.ndarray, context: int) -> np.ndarray:
    """cu_seqlens of rows that begin at `first` of a shard whose documents end at `end`."""
    b = len(first)
    # keys of another type than the map's would make searchsorted copy the whole map
    keys = np.concatenate([first, first + (context - 1)]).astype(end.dtype)
    inside = end.searchsorted(keys, "right")  # the documents that end inside a row, not at its very end
    counts = inside[b:] - inside[:b] + 1
    after = counts.cumsum()
    before = after - counts
    index = np.arange(after[-1]) + np.repeat(inside[:b] - before - 1, counts)
    cuts = np.empty(len(index) + 1, np.int64)
    cuts[:-1] = end[index]
    cuts[before] = first
    cuts[:-1] += np.repeat(np.arange(b) * context - first, counts)
    cuts[-1] = b * context
    return cuts.astype(np.int32)


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
        columns = (row, at, shard, start - self.split.starts[shard], n)
        segments = list(zip(*(column.tolist() for column in columns)))
        tokens, mask, side = self._gather(b, segments, dtype, padded=True)
        bounds = np.concatenate([row * C + at, np.arange(b + 1) * C, np.arange(b) * C + lengths])
        padded = lengths if (lengths < C).any() else None
        return Arrays(tokens, np.unique(bounds).astype(np.int32), padded, mask, side)
