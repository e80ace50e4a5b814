"""Row plans: which pieces of documents make up each row. Planned once, stored, mapped into memory.

A piece is a run of ids inside one document: (start in the split, length). Best-fit packing places documents
in decreasing length, each into the fullest row that still has room; a document that fits into a row is never
split, a longer one gives full rows and one remainder. (Ding et al., Fewer Truncations Improve Language
Modeling, 2024.)
"""

from __future__ import annotations

import bisect
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.files import DatasetError, canonical, digest, explain, writing
from dataset.format import Dataset, Split
from dataset.order import Permutation, derive

ALGORITHM = 1  # part of the view's hash: a change of the plan is a change of the order
GROUP_DOCUMENTS = 2**22  # planned together: bounds the memory of planning


@dataclass(frozen=True)
class Selection:
    """Which documents a view uses.

    min_tokens, max_tokens: of a document, EOS included; 0: no limit. byte_budget: about so many text bytes,
    taken by document in a fixed random order (the document that crosses the budget is still in); 0: all.
    """

    min_tokens: int = 0
    max_tokens: int = 0
    byte_budget: int = 0

    @property
    def everything(self) -> bool:
        return not (self.min_tokens or self.max_tokens or self.byte_budget)

    def groups(self, split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(start in the split, length), int64 [documents], of the chosen documents by shard group."""
        chosen = self._within_budget(split)
        starts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for k, shard in enumerate(split.shards):
            n = shard.len.astype(np.int64)
            keep = n >= self.min_tokens
            if self.max_tokens:
                keep &= n <= self.max_tokens
            if chosen is not None:
                low, high = np.searchsorted(chosen, split.first_documents[k : k + 2])
                inside = np.zeros(len(n), bool)
                inside[chosen[low:high] - split.first_documents[k]] = True
                keep &= inside
            starts.append(shard.end.astype(np.int64)[keep] - n[keep] + split.starts[k])
            lengths.append(n[keep])
            if sum(map(len, lengths)) >= GROUP_DOCUMENTS:
                yield np.concatenate(starts), np.concatenate(lengths)
                starts, lengths = [], []
        if lengths:
            yield np.concatenate(starts), np.concatenate(lengths)

    def _within_budget(self, split: Split) -> np.ndarray | None:
        """Sorted numbers of the documents inside the byte budget, or None: all."""
        if not self.byte_budget or self.byte_budget >= split.bytes:
            return None
        table = split.dataset.tokenizer.bytes_per_token
        order = Permutation(split.documents, derive("byte budget", split.dataset.id, split.name))
        chosen: list[int] = []
        used = 0
        # the table may count fewer bytes than the text has, where the tokenizer changes it
        while used < self.byte_budget and len(chosen) < split.documents:
            at = np.arange(len(chosen), min(len(chosen) + 1024, split.documents))
            for document in order(at).tolist():
                chosen.append(document)
                used += int(table[split.document(document)].sum())
                if used >= self.byte_budget:
                    break
        return np.array(sorted(chosen), np.int64)


@dataclass(frozen=True)
class Pieces:
    """A plan. first: u8 [rows+1] number of each row's first piece; start u8, length u4: [pieces]."""

    first: np.ndarray
    start: np.ndarray
    length: np.ndarray
    dropped_tokens: int

    @property
    def rows(self) -> int:
        return len(self.first) - 1


Plan = tuple[np.ndarray, np.ndarray, np.ndarray]  # pieces per row, start, length


def concat(start: np.ndarray, length: np.ndarray, context: int) -> Plan:
    """Documents one after another, cut every `context` ids; the last row may be short."""
    total = int(length.sum())
    ends = np.cumsum(length)
    cuts = np.union1d(np.arange(0, total, context), ends - length)
    document = np.searchsorted(ends, cuts, "right")
    size = np.diff(np.append(cuts, total))
    offset = cuts - (ends - length)[document]
    return np.bincount(cuts // context), start[document] + offset, size


def documents(start: np.ndarray, length: np.ndarray, context: int) -> Plan:
    """Every document in rows of its own: one piece a row."""
    count = -(-length // context)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    begin = np.repeat(start, count) + within * context
    return np.ones(len(begin), np.int64), begin, np.minimum(np.repeat(start + length, count) - begin, context)


def best_fit(start: np.ndarray, length: np.ndarray, context: int) -> Plan:
    """Best-fit decreasing, placed by classes of equal length and equal room instead of one by one."""
    full = length // context
    long_start = np.repeat(start, full)
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    rest = length - full * context
    left = np.flatnonzero(rest)
    order = left[np.argsort(-rest[left], kind="stable")]
    row, rows = _place(rest[order], context)
    by_row = np.argsort(row, kind="stable")
    order = order[by_row]
    per_row = np.bincount(row, minlength=rows)
    return (
        np.concatenate([np.ones(len(within), np.int64), per_row]),
        np.concatenate([long_start + within * context, start[order] + full[order] * context]),
        np.concatenate([np.full(len(within), context), rest[order]]),
    )


def _place(sizes: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """Rows of decreasing `sizes`: (row of each item, number of rows)."""
    row = np.empty(len(sizes), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # free ids -> rows with just so many
    free: list[int] = []  # the keys of `room`, sorted
    rows = at = 0
    values, counts = np.unique(-sizes, return_counts=True)
    for size, n in zip((-values).tolist(), counts.tolist()):
        while n:
            where = bisect.bisect_left(free, size)
            if where < len(free):  # the fullest rows with room
                space = free[where]
                each = space // size
                bins = np.concatenate(room[space])
                used, bins = np.split(bins, [min(len(bins), -(-n // each))])
                if len(bins):
                    room[space] = [bins]
                else:
                    del room[space], free[where]
            else:
                space, each = context, context // size
                used = np.arange(rows, rows + -(-n // each))
                rows += len(used)
            items = np.repeat(used, each)[:n]
            row[at : at + len(items)] = items
            at, n = at + len(items), n - len(items)
            last = len(items) - each * (len(used) - 1)  # the last row of the class may get fewer
            for bins, taken in ((used[:-1], each), (used[-1:], last)):
                left = space - taken * size
                if left and len(bins):
                    if left not in room:
                        bisect.insort(free, left)
                    room.setdefault(left, []).append(bins)
    return row, rows


PLANNERS = {"best_fit": best_fit, "documents": documents, "concat": concat}


def pieces_for(split: Split, packing: str, context: int, selection: Selection) -> Pieces:
    """The plan of a view, from the dataset's `.views` folder or made and stored there.

    A dataset that cannot be written to gets its plans in the temporary folder. Raises DatasetError.
    """
    name = digest(
        canonical([ALGORITHM, split.dataset.id, split.name, packing, context, list(vars(selection).values())])
    )[:32]
    path = _folder(split.dataset) / f"{name}.pieces"
    if not path.exists():
        _store(path, _plan(split, packing, context, selection))
    return _load(path, split)


def _folder(dataset: Dataset) -> Path:
    if os.access(dataset.path, os.W_OK):
        return dataset.path / ".views"
    return Path(tempfile.gettempdir(), f"latent-lab-views-{os.getuid() if hasattr(os, 'getuid') else 0}")


def _plan(split: Split, packing: str, context: int, selection: Selection) -> list[Plan]:
    plans = [PLANNERS[packing](s, n, context) for s, n in selection.groups(split) if len(n)]
    if packing == "concat":  # as in the arithmetic view, a last row that is not full is dropped
        for i, (per_row, start, length) in enumerate(plans):
            last = int(per_row[-1])
            if int(length[-last:].sum()) < context:
                plans[i] = (per_row[:-1], start[:-last], length[:-last])
    return plans


def _store(path: Path, plans: list[Plan]) -> None:
    per_row, start, length = (
        np.concatenate([p[i] for p in plans]) if plans else np.zeros(0, np.int64) for i in range(3)
    )
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with writing(path) as file:
        file.write(np.array([len(per_row), len(start)], "<u8").tobytes())
        file.write(np.concatenate([[0], np.cumsum(per_row)]).astype("<u8").tobytes())
        file.write(start.astype("<u8").tobytes())
        file.write(length.astype("<u4").tobytes())


def _load(path: Path, split: Split) -> Pieces:
    try:
        size = path.stat().st_size
        rows, count = (int(n) for n in np.fromfile(path, "<u8", 2))
    except (OSError, ValueError) as error:
        raise (explain(error, path) if isinstance(error, OSError) else _damaged(path)) from error
    if size != 8 * (2 + rows + 1) + 12 * count:
        raise _damaged(path)
    data = np.memmap(path, np.uint8, "r")
    first = data[16 : 16 + 8 * (rows + 1)].view("<u8")
    start = data[16 + 8 * (rows + 1) : size - 4 * count].view("<u8")
    length = data[size - 4 * count :].view("<u4")
    return Pieces(first, start, length, split.tokens - int(length.sum(dtype=np.int64)))


def _damaged(path: Path) -> DatasetError:
    return DatasetError(f"{path}: damaged row plan. Delete the file: it is made again when needed")
