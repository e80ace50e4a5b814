"""A view turns a sample number into a row: context, packing, split, seed and order, over one dataset.

Shape legend: b rows of this rank  C context.

The state of a loader is the number of the next batch and `view.id`; there is no other. Samples are numbered
over all epochs; epoch e is a permutation of the rows keyed by (seed, e, dataset id), and step s of a global
batch G holds samples s*G .. (s+1)*G, cut into `world` equal runs. So every world size sees the same batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.files import DatasetError, canonical, digest
from dataset.format import Dataset, Split
from dataset.order import BlockPermutation, Permutation, derive
from dataset.packing import Arrays, ConcatRows, PlannedRows, Rows
from dataset.pieces import ALGORITHM, PLANNERS, Selection, pieces_for
from dataset.sidecar import Sidecar

if TYPE_CHECKING:
    from dataset.loader import Batch

SHUFFLES = (True, False, "rows", "block")


def local_samples(step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """int64 [global_batch / world]: the sample numbers of `rank` at `step`. Raises DatasetError."""
    if global_batch < 1 or world < 1 or global_batch % world:
        raise DatasetError(f"global batch {global_batch} does not divide among {world} ranks")
    if not 0 <= rank < world:
        raise DatasetError(f"rank {rank} is outside 0..{world - 1}")
    if step < 0:
        raise DatasetError(f"step {step} is negative")
    b = global_batch // world
    first = step * global_batch + rank * b
    return np.arange(first, first + b, dtype=np.int64)


class Samples(ABC):
    """Anything that gives rows by sample number: a view, a mixture, a length schedule.

    id: hash of all that decides the batches. context: C. text_bytes: int32 [vocab], text bytes of every id.
    narrow: dtype of the stored ids. side_kind: "loss", "weight" or None, of `Arrays.side`.
    """

    id: str
    context: int
    rows: int
    text_bytes: np.ndarray
    narrow: np.dtype
    tokenizer_identity: str
    side_kind: str | None = None

    @abstractmethod
    def arrays(self, samples: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        """The rows of some sample numbers (int64 [b], increasing), as numpy."""

    def step_arrays(self, step: int, global_batch: int, rank: int, world: int, dtype=np.int64) -> Arrays:
        """The rows of `rank` at `step`."""
        return self.arrays(local_samples(step, global_batch, rank, world), dtype)

    def batch(self, step: int, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of global batch `step`: tokens [global_batch/world, context], torch.

        Raises DatasetError when the batch does not divide among the ranks.
        """
        from dataset.loader import to_torch

        return to_torch(self.step_arrays(step, global_batch, rank, world), self)

    def epoch(self, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The first `rows` samples over all ranks, the last batches smaller: of a view every row exactly
        once, for evaluation."""
        from dataset.loader import to_torch

        mine = np.arange(rank, self.rows, world, dtype=np.int64)
        for at in range(0, len(mine), batch):
            yield to_torch(self.arrays(mine[at : at + batch]), self)

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [vocab]: UTF-8 text bytes that each id stands for; EOS 0."""
        return self.text_bytes


class View(Samples):
    """Rows of one split of one dataset in a keyed order.

    context: ids a row. seed: of the order. split: "train" or "heldout".
    packing: "concat" (all documents joined and cut), "best_fit" (no document that fits is split; almost no
        padding), "documents" (one document a row, padded; longer ones take several rows).
    shuffle: True, False (stored order), or "block" (blocks of 64 rows: for cold or remote files).
    min_tokens, max_tokens, byte_budget: choose documents, see `pieces.Selection`.
    sidecar: name of stored per-token values, see `dataset.sidecar`.
    rows: an epoch's. dropped_tokens: ids that an epoch leaves out.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        context: int,
        packing: str = "concat",
        seed: int = 0,
        split: str = "train",
        shuffle: bool | str = True,
        sidecar: str | None = None,
        min_tokens: int = 0,
        max_tokens: int = 0,
        byte_budget: int = 0,
    ) -> None:
        if packing not in list(PLANNERS):  # of a list, so that what has no hash is refused too
            raise DatasetError(f"packing {packing!r}: allowed are {', '.join(sorted(PLANNERS))}")
        if shuffle not in SHUFFLES:
            raise DatasetError(f"shuffle {shuffle!r}: allowed are True, False, 'block'")
        chosen = {"min_tokens": min_tokens, "max_tokens": max_tokens, "byte_budget": byte_budget}
        for name, value in {"context": context, **chosen}.items():
            least = 1 if name == "context" else 0
            if type(value) is not int or value < least:
                raise DatasetError(f"{name} {value!r}: a whole number, at least {least}, is needed")
        self.dataset, self.context, self.seed = dataset, context, seed
        self.shuffle: bool | str = True if shuffle == "rows" else shuffle
        self.split = _split(dataset, split)
        self.text_bytes = dataset.tokenizer.bytes_per_token
        self.tokenizer_identity = dataset.tokenizer_identity
        self.narrow = self.split.shards[0].dtype
        side = Sidecar(dataset, sidecar) if sidecar else None
        self.side_kind = side.kind if side else None
        selection = Selection(min_tokens, max_tokens, byte_budget)
        self.source = _rows(self.split, context, packing, selection, side)
        self.rows = self.source.rows
        self.dropped_tokens = self.source.dropped_tokens
        self.settings: dict[str, Any] = {
            "dataset": dataset.id,
            "split": split,
            "context": context,
            "packing": [packing, ALGORITHM],
            "selection": vars(selection),
            "seed": seed,
            "shuffle": self.shuffle,
            "sidecar": side.id if side else None,
        }
        self.id = digest(canonical(self.settings))
        self._order = lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, epoch: int) -> Permutation | BlockPermutation:
        kind = BlockPermutation if self.shuffle == "block" else Permutation
        return kind(self.rows, derive(self.seed, epoch, self.dataset.id, self.split.name))

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Row numbers, int64 [b], of sample numbers over all epochs."""
        if not len(samples):
            return samples
        epoch = int(samples[0]) // self.rows
        if epoch == int(samples[-1]) // self.rows:  # nearly always: the call's samples lie in one epoch
            within = samples - epoch * self.rows
            return self._order(epoch).take(within) if self.shuffle else within
        epochs, within = np.divmod(samples, self.rows)
        if not self.shuffle:
            return within
        rows = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch).take(within[here])
        return rows

    def arrays(self, samples: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        return self.source.read(self.locate(samples), dtype)

    def tokens(self, samples: np.ndarray, dtype: np.dtype | type | None = None) -> np.ndarray:
        """[b, C] ids alone, in the stored dtype: for readers that need no boundaries (concat only)."""
        if not isinstance(self.source, ConcatRows):
            raise DatasetError("rows without boundaries exist for packing 'concat' only")
        return self.source.read_tokens(self.locate(samples), dtype or self.narrow)


class LengthSchedule(Samples):
    """Short rows first: every row of `view` is cut into rows of the stage's context.

    stages: [(first step, context)], the first at step 0; every context divides the view's. A global batch
    counts rows of the view, so every step has the same number of ids, and each id still comes once an epoch.
    Raises DatasetError for contexts that do not divide, or unordered stages.
    """

    def __init__(self, view: Samples, stages: Sequence[tuple[int, int]]) -> None:
        steps = [step for step, _ in stages]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
            raise DatasetError(f"length schedule: stages must start at step 0 and increase, got {steps}")
        for _, context in stages:
            if type(context) is not int or context < 1 or view.context % context:
                raise DatasetError(
                    f"length schedule: context {context!r} does not divide the view's {view.context}"
                )
        self._view, self._stages = view, list(stages)
        self.context, self.rows = view.context, view.rows
        self.text_bytes, self.narrow, self.side_kind = view.text_bytes, view.narrow, view.side_kind
        self.tokenizer_identity = view.tokenizer_identity
        self.settings = {"view": view.id, "stages": [list(s) for s in self._stages]}
        self.id = digest(canonical(self.settings))

    def context_at(self, step: int) -> int:
        """Ids a row at `step`."""
        return [context for start, context in self._stages if start <= step][-1]

    def arrays(self, samples: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        return self._view.arrays(samples, dtype)

    def step_arrays(self, step: int, global_batch: int, rank: int, world: int, dtype=np.int64) -> Arrays:
        rows = super().step_arrays(step, global_batch, rank, world, dtype)
        return shorten(rows, self.context_at(step))


def shorten(rows: Arrays, context: int) -> Arrays:
    """Each row cut into rows of `context` ids (a divisor of the row length)."""
    b, C = rows.tokens.shape
    if context == C:
        return rows
    lengths = rows.lengths
    if lengths is not None:
        starts = np.arange(0, C, context)
        lengths = np.clip(lengths[:, None] - starts, 0, context).reshape(-1)
    cu = np.union1d(rows.cu_seqlens, np.arange(0, b * C + 1, context)).astype(np.int32)

    def cut(x):
        return None if x is None else x.reshape(-1, context)

    return Arrays(rows.tokens.reshape(-1, context), cu, lengths, cut(rows.mask), cut(rows.side))


def _rows(split: Split, context: int, packing: str, selection: Selection, side: Sidecar | None) -> Rows:
    if packing == "concat" and selection.everything:
        return ConcatRows(split, context, side)
    return PlannedRows(split, context, pieces_for(split, packing, context, selection), side)


def _split(dataset: Dataset, name: str) -> Split:
    if name not in dataset.splits:
        raise DatasetError(f"{dataset.path}: no split {name!r}; it has {', '.join(dataset.splits)}")
    split = dataset.splits[name]
    if not split.documents:
        raise DatasetError(
            f"{dataset.path}: split {name!r} holds no documents ({dataset.manifest['heldout']:.2%} of "
            f"{dataset.manifest['counts']['documents']:,} were held out). Prepare with a larger --heldout"
        )
    return split
