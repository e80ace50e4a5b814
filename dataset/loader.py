"""The edge to torch: batches as tensors, and a thread that reads ahead.

Shape legend: b rows of this rank  C context  N documents in the batch.

Reading ahead is no part of the state: a loader stopped anywhere resumes from `state`, an integer and the
view's hash, at any world size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataset.files import DatasetError
from dataset.packing import Arrays

if TYPE_CHECKING:
    from dataset.views import Samples


@dataclass(frozen=True)
class Batch:
    """Rows for one rank and step.

    tokens:     int64 [b, C]; labels are the same tokens, unshifted: heads shift them.
    cu_seqlens: int32 [N+1] over the flattened b*C, row starts included, ends at b*C.
    weights:    float32 [b, C] of the loss, or None: all ones. Padding weighs 0.
    lengths:    int64 [b]: ids before a row's padding, or None: no padding.
    sidecar:    float32 [b, C], the stored per-token value (a reference loss), or None.
    text_bytes: int32 [vocab]: the table behind `bytes`.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    weights: Tensor | None = None
    lengths: Tensor | None = None
    sidecar: Tensor | None = None
    text_bytes: Tensor | None = None

    @property
    def bytes(self) -> int:
        """UTF-8 text bytes that the batch's ids stand for; EOS and padding count 0."""
        assert self.text_bytes is not None
        return int(self.text_bytes.to(self.tokens.device)[self.tokens].sum())

    @property
    def max_seqlen(self) -> int:
        return int(self.cu_seqlens.diff().max())

    @property
    def positions(self) -> Tensor:
        """int64 [b, C]: place of each id in its document's piece."""
        lengths = self.cu_seqlens.diff().long()
        starts = torch.repeat_interleave(self.cu_seqlens[:-1].long(), lengths)
        return (torch.arange(len(starts), device=starts.device) - starts).view_as(self.tokens)

    def _travelling(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are this batch's own: the table of bytes is every batch's."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "text_bytes":
                yield name, value

    def to(self, device: torch.device | str) -> Batch:
        """On `device`, without waiting when the memory is pinned; ids are widened there."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self._travelling()}
        moved["tokens"] = moved["tokens"].to(torch.int64)
        return replace(self, **moved)

    def pin(self) -> Batch:
        """In page-locked memory (needs CUDA)."""
        return replace(self, **{name: value.pin_memory() for name, value in self._travelling()})


def to_torch(arrays: Arrays, view: Samples) -> Batch:
    """Tensors over the same memory."""
    C = arrays.tokens.shape[1]
    weights = None if arrays.mask is None else arrays.mask.astype(np.float32)
    if arrays.lengths is not None:
        valid = np.arange(C) < arrays.lengths[:, None]
        weights = valid.astype(np.float32) if weights is None else weights * valid
    side = arrays.side
    if side is not None and view.side_kind == "weight":
        weights, side = (side if weights is None else weights * side), None
    return Batch(
        torch.from_numpy(arrays.tokens),
        torch.from_numpy(arrays.cu_seqlens),
        None if weights is None else torch.from_numpy(weights),
        None if arrays.lengths is None else torch.from_numpy(arrays.lengths),
        None if side is None else torch.from_numpy(side),
        torch.from_numpy(view.text_bytes),
    )


class Loader:
    """Iterates this rank's batches from `step` on, for ever, read ahead by a thread.

    ahead: batches read ahead; 0 reads in the caller. device: where batches arrive; on CUDA the narrow ids
    travel from pinned memory and are widened there. Errors of the thread are raised in the caller.
    Use it in a `with` block, or `close` it.
    """

    def __init__(
        self,
        view: Samples,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        step: int = 0,
        ahead: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        self.view, self.global_batch, self.rank, self.world = view, global_batch, rank, world
        self.step, self.ahead, self.device = step, ahead, torch.device(device)
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> dict[str, Any]:
        """{"step": number of the next global batch, "view": its hash, "global_batch"}."""
        return {"step": self.step, "view": self.view.id, "global_batch": self.global_batch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises DatasetError when it is of another view or global batch."""
        for key, mine in (("view", self.view.id), ("global_batch", self.global_batch)):
            if state[key] != mine:
                raise DatasetError(
                    f"loader state: its {key} is {state[key]}, this loader's is {mine}. Resume with the same "
                    "dataset, context, packing, seed and global batch"
                )
        self.close()
        self.step = int(state["step"])

    def _read(self, step: int) -> Batch:
        """On a GPU's behalf the ids stay narrow, in pinned memory; `Batch.to` widens them there."""
        gpu = self.device.type == "cuda"
        dtype = self.view.narrow if gpu else np.dtype(np.int64)
        arrays = self.view.step_arrays(step, self.global_batch, self.rank, self.world, dtype)
        batch = to_torch(arrays, self.view)
        return batch.pin() if gpu else batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.ahead < 1:
            batch = self._read(self.step)
        else:
            if self._thread is None:
                self._start()
            batch = self._queue.get()
            if isinstance(batch, BaseException):
                self.close()
                raise batch
        self.step += 1
        return batch.to(self.device)

    def _start(self) -> None:
        self._queue: queue.Queue = queue.Queue(self.ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(self.step, self._queue, self._stop), name="dataset-reader", daemon=True
        )
        self._thread.start()

    def _fill(self, step: int, out: queue.Queue, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                item: Any = self._read(step)
            except BaseException as error:  # handed to the caller, who raises it
                item = error
            while not stop.is_set():
                try:
                    out.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def close(self) -> None:
        """Stop reading ahead. `step` stays: iterating again goes on from it."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
