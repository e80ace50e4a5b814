"""From a view of a dataset to the micro batches of a step, on the device, with their documents.

Shape legend: b rows of this rank  B rows of a micro batch  T context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.loader import Batch, Loader
from dataset.views import Samples, View
from model.core import Docs
from model.schema import ConfigError
from model.sections import RunConfig
from train.batches import BatchPlan, Staged
from train.world import World

MICRO_TOKENS = 8192  # tokens of a micro batch when run.micro does not say


@dataclass(frozen=True)
class Micro:
    """tokens [B, T] int64; labels are the same, unshifted; weights [B, T] fp32 or None; docs of its rows;
    reference [B, T] fp32: nats of a reference model for each token, or None."""

    tokens: Tensor
    labels: Tensor
    docs: Docs
    weights: Tensor | None = None
    reference: Tensor | None = None


def cut(batch: Batch, rows: int) -> list[Micro]:
    """A batch in micro batches of at most `rows` rows; no document crosses a row, so none is cut."""
    b, T = batch.tokens.shape
    cu = batch.cu_seqlens.to(torch.int64)
    micros = []
    for first in range(0, b, rows):
        last = min(first + rows, b)
        inside = cu[(cu >= first * T) & (cu <= last * T)] - first * T
        docs = Docs.packed(inside, last - first)
        if batch.lengths is not None:
            docs = padded(docs, batch.lengths[first:last])
        tokens = batch.tokens[first:last]
        weights, reference = (None if x is None else x[first:last] for x in (batch.weights, batch.sidecar))
        micros.append(Micro(tokens, tokens, docs, weights, reference))
    return micros


def padded(docs: Docs, lengths: Tensor) -> Docs:
    """The same rows, of which only the first `lengths` [B] tokens are any."""
    T = docs.segments.shape[1]
    keep = torch.arange(T, device=lengths.device) < lengths[:, None]
    if bool(keep.all()):
        return docs
    return Docs.from_segments(torch.where(keep, docs.segments, -1), docs.positions * keep)


def micro_rows(run: RunConfig, world: World, parts: int = 1) -> int:
    """Rows of a micro batch: as configured, or an even cut into about MICRO_TOKENS tokens.

    Raises ConfigError when the global batch does not divide among the ranks.
    """
    for size in sorted(BatchPlan(run).sizes):
        if size % (world.size * parts):
            among = f"{world.size * parts} ranks" if parts == 1 else f"{parts} workers of {world.size} ranks"
            raise ConfigError([f"run.batch: {size} sequences do not divide among {among}"])
    mine = run.batch // (world.size * parts)
    if run.micro:
        return min(run.micro, mine)
    pieces = -(-mine * run.context // MICRO_TOKENS)
    return -(-mine // min(mine, max(1, pieces)))


class Feed:
    """This rank's micro batches, read ahead by a thread; the step is the only state."""

    def __init__(self, view: View, run: RunConfig, world: World, ahead: int = 2, parts: int = 1) -> None:
        """parts: workers, or shards, that every batch is divided among; `micros` says whose it wants."""
        self.view: Samples = view
        plan = BatchPlan(run)
        if len(plan.stages) > 1:
            self.view = Staged(view, plan)
        self.rows = micro_rows(run, world, parts)
        self.world = world
        size = parts * world.size
        self._loader = Loader(self.view, run.batch, world.rank, size, ahead=ahead, device=world.device)

    def micros(self, step: int, part: int = 0) -> list[Micro]:
        """The micro batches of an optimizer step. Steps are usually asked for in order."""
        rank = part * self.world.size + self.world.rank
        if (self._loader.step, self._loader.rank) != (step, rank):
            self._loader.close()
            self._loader.step, self._loader.rank = step, rank
        return cut(next(self._loader), self.rows)

    def close(self) -> None:
        self._loader.close()
