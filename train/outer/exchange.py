"""The mean of coded vectors over workers: everybody sends, everybody decodes the same bytes.

Shape legend: k workers  N values of a vector  n values of a worker's part of it.

Every worker owns a k-th part of the vector. It sends each owner the codes of that part, gets k codes of its
own part, adds them in fp32 in the order of workers, codes the mean again (with an error feedback of its
own) and sends it to all. The owner, too, takes what its own code decodes to. So replicas stay equal to the
bit for every codec, and a worker sends 2 (k-1)/k of a coded vector, as a ring would.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from train.errors import UserError
from train.outer import arrays, rules
from train.outer.arrays import Array
from train.outer.codec import Codec, Sender

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass
class Traffic:
    """Payload bytes that this worker sent and received, and exchanges."""

    sent: int = 0
    received: int = 0
    rounds: int = 0

    def add(self, sent: int, received: int) -> None:
        self.sent += sent
        self.received += received


class Comm(Protocol):
    """Two collectives on uint8 host arrays; all arrays of a call have the same length on every worker."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def swap(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """parts[j] goes to worker j; returns what each worker sent to this one."""

    def share(self, part: np.ndarray) -> list[np.ndarray]:
        """Every worker's part, in the order of workers."""


class Meeting:
    """k workers as threads of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[list[np.ndarray]] = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size)

    def place(self, rank: int) -> Comm:
        return _Seat(self, rank)

    def exchange(self, rank: int, parts: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        self._slots[rank] = list(parts)
        self._barrier.wait(600)
        slots = list(self._slots)
        self._barrier.wait(600)
        return slots


@dataclass(frozen=True)
class _Seat:
    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def swap(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [slot[self.rank] for slot in self.meeting.exchange(self.rank, parts)]

    def share(self, part: np.ndarray) -> list[np.ndarray]:
        return [slot[0] for slot in self.meeting.exchange(self.rank, [part])]


class Alone:
    """One worker: k = 1 is DiLoCo too."""

    rank, size = 0, 1

    def swap(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(parts)

    def share(self, part: np.ndarray) -> list[np.ndarray]:
        return [part]


class Collective:
    """A process group of torch.distributed; it must not be used by anybody else at the same time."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        import torch.distributed as dist

        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def swap(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch
        import torch.distributed as dist

        send = torch.from_numpy(np.concatenate(parts))
        out = torch.empty_like(send)
        with _named():
            dist.all_to_all_single(out, send, group=self.group)
        return list(out.numpy().reshape(self.size, -1))

    def share(self, part: np.ndarray) -> list[np.ndarray]:
        import torch
        import torch.distributed as dist

        out = torch.empty(self.size * part.size, dtype=torch.uint8)
        with _named():
            dist.all_gather_into_tensor(out, torch.from_numpy(part), group=self.group)
        return list(out.numpy().reshape(self.size, -1))


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """A broken collective as a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"an exchange between workers failed ({str(error).splitlines()[0][:120]}); a worker has left or "
            f"the network is down. Start all of them again with --resume, or use outer.kind: async, where "
            f"workers may come and go"
        ) from error


class Channel:
    """The repeated mean of one fragment: a codec, and what error feedback remembers in both directions."""

    def __init__(self, n: int, comm: Comm, codec: Codec, feedback: bool, traffic: Traffic) -> None:
        self.n, self.comm, self.traffic = n, comm, traffic
        self.part = -(-n // comm.size)
        self.up = [Sender(codec, self.part, feedback) for _ in range(comm.size)]
        self.down = Sender(codec, self.part, feedback)

    def mean(self, x: Array) -> Array:
        """The mean over workers of x [N]. Every worker must call this in the same order."""
        k, n, xp = self.comm.size, self.part, arrays.namespace(x)
        padded = x if k * n == self.n else xp.concat([x, xp.zeros(k * n - self.n, dtype=x.dtype)])
        codes = [arrays.to_host(s.encode(padded[j * n : (j + 1) * n])) for j, s in enumerate(self.up)]
        got = self.comm.swap(codes)
        decode = self.down.codec.decode
        mine = rules.mean([decode(xp.asarray(c), n) for c in got])
        out = self.comm.share(arrays.to_host(self.down.encode(mine)))
        one = codes[0].size * (k - 1)
        self.traffic.add(2 * one, 2 * one)
        return xp.concat([decode(xp.asarray(c), n) for c in out])[: self.n]

    def residuals(self) -> list[Array | None]:
        return [s.residual for s in (*self.up, self.down)]

    def set_residuals(self, values: Sequence[Array | None]) -> None:
        for s, value in zip((*self.up, self.down), values, strict=True):
            s.residual = value
