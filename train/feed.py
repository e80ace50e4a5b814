"""From a view of a dataset to the micro batches of a step, on the device, with their documents.

Shape legend: b rows of this rank  B rows of a micro batch  T context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.loader import Batch, Loader
from dataset.views import View
from model.core import Docs
from model.schema import ConfigError
from model.sections import RunConfig
from train.world import World

MICRO_TOKENS = 8192  # tokens of a micro batch when run.micro does not say


@dataclass(frozen=True)
class Micro:
    """tokens [B, T] int64; labels are the same, unshifted; weights [B, T] fp32 or None; docs of its rows."""

    tokens: Tensor
    labels: Tensor
    docs: Docs
    weights: Tensor | None = None


def cut(batch: Batch, rows: int) -> list[Micro]:
    """A batch in micro batches of at most `rows` rows; no document crosses a row, so none is cut."""
    b, T = batch.tokens.shape
    cu = batch.cu_seqlens.to(torch.int64)
    micros = []
    for first in range(0, b, rows):
        last = min(first + rows, b)
        inside = cu[(cu >= first * T) & (cu <= last * T)] - first * T
        tokens = batch.tokens[first:last]
        weights = None if batch.weights is None else batch.weights[first:last]
        micros.append(Micro(tokens, tokens, Docs.packed(inside, last - first), weights))
    return micros


def micro_rows(run: RunConfig, world: World) -> int:
    """Rows of a micro batch: as configured, or an even cut into about MICRO_TOKENS tokens.

    Raises ConfigError when the global batch does not divide among the ranks.
    """
    if run.batch % world.size:
        raise ConfigError([f"run.batch: {run.batch} sequences do not divide among {world.size} ranks"])
    mine = run.batch // world.size
    if run.micro:
        return min(run.micro, mine)
    pieces = -(-mine * run.context // MICRO_TOKENS)
    return -(-mine // min(mine, max(1, pieces)))


class Feed:
    """This rank's micro batches, read ahead by a thread; the step is the only state."""

    def __init__(self, view: View, run: RunConfig, world: World, ahead: int = 2) -> None:
        self.view = view
        self.rows = micro_rows(run, world)
        self._loader = Loader(view, run.batch, world.rank, world.size, ahead=ahead, device=world.device)

    def micros(self, step: int) -> list[Micro]:
        """The micro batches of an optimizer step. Steps are usually asked for in order."""
        if self._loader.step != step:
            self._loader.close()
            self._loader.step = step
        return cut(next(self._loader), self.rows)

    def close(self) -> None:
        self._loader.close()
