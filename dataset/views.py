"""A view turns a sample number into a row: context, packing, split, seed and order, over one dataset.

The state of a loader is the number of the next batch and `view.id`; there is no other. Samples are numbered
over all epochs; epoch e is a permutation of the rows keyed by (seed, e, dataset id), and step s of a global
batch G holds samples s*G .. (s+1)*G, cut into `world` equal runs. So every world size sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.files import DatasetError, canonical, digest
from dataset.format import Dataset, Split
from dataset.order import Permutation, derive
from dataset.packing import Arrays, ConcatRows

if TYPE_CHECKING:
    from dataset.loader import Batch

PACKINGS = ("concat",)


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


class View:
    """Rows of one split in a keyed order.

    context: ids a row. packing: "concat". seed: of the order. split: "train" or "heldout".
    shuffle: True, or False for rows in stored order.
    rows: an epoch's. dropped_tokens: ids that an epoch leaves out. id: hash of all that decides the batches.
    bytes_per_token: int32 [vocab], text bytes of every id.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        context: int,
        packing: str = "concat",
        seed: int = 0,
        split: str = "train",
        shuffle: bool = True,
    ) -> None:
        if context < 1:
            raise DatasetError(f"context {context}: at least 1 id a row is needed")
        if packing not in PACKINGS:
            raise DatasetError(f"packing {packing!r}: allowed are {', '.join(PACKINGS)}")
        self.dataset, self.context, self.seed, self.shuffle = dataset, context, seed, shuffle
        self.split = _split(dataset, split)
        self.source = ConcatRows(self.split, context)
        self.rows = self.source.rows
        self.dropped_tokens = self.source.dropped_tokens
        self.settings: dict[str, Any] = {
            "dataset": dataset.id,
            "split": split,
            "context": context,
            "packing": packing,
            "seed": seed,
            "shuffle": shuffle,
        }
        self.id = digest(canonical(self.settings))
        self._order = lru_cache(maxsize=4)(self._permutation)

    @property
    def bytes_per_token(self) -> np.ndarray:
        return self.dataset.tokenizer.bytes_per_token

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.rows, derive(self.seed, epoch, self.dataset.id, self.split.name))

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Row numbers, int64 [b], of sample numbers over all epochs."""
        epochs, within = np.divmod(samples, self.rows)
        if not self.shuffle:
            return within
        rows = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch).take(within[here])
        return rows

    def arrays(self, samples: np.ndarray, dtype: np.dtype | type = np.int64) -> Arrays:
        """The rows of some sample numbers (increasing), as numpy."""
        return self.source.read(self.locate(samples), dtype)

    def batch(self, step: int, global_batch: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of global batch `step`: tokens [global_batch/world, context], torch.

        Raises DatasetError when the batch does not divide among the ranks.
        """
        from dataset.loader import to_torch

        return to_torch(self.arrays(local_samples(step, global_batch, rank, world)), self)

    def epoch(self, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every row exactly once over all ranks, the last batches smaller: for evaluation."""
        from dataset.loader import to_torch

        mine = np.arange(rank, self.rows, world, dtype=np.int64)
        for at in range(0, len(mine), batch):
            yield to_torch(self.arrays(mine[at : at + batch]), self)


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
