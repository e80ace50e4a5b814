"""Where a process runs: its rank, its device, and what ranks must tell each other.

`torchrun` says who is who through the environment; without it there is one process and no process group.
Few collectives are used, so that gloo and NCCL behave alike. How a model is spread over ranks is in
`train.sharding`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from train.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """rank and size of the data-parallel group, and this rank's device.

    group:   the process group of these ranks; None: every rank of the launch.
    worker, workers: which of several such groups this is, and how many there are (see `divided`).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None
    worker: int = 0
    workers: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """The ranks that train this worker's model, as a process group; None when this rank is alone."""
        return None if self.size == 1 else self.group or dist.group.WORLD

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a small tensor, in place; fp64 keeps counts and losses exact enough."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; they may differ in shape and kind."""
        if self.size == 1:
            return [value]
        box: list[T | None] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box  # type: ignore[return-value]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run on rank 0 and give every rank its result. If it fails there, every rank raises.

        Without this, ranks would wait at their next collective for one that has left.
        """
        if self.size == 1:
            return action()
        box: list[object] = [None, None]
        failure: Exception | None = None
        if self.main:
            try:
                box[0] = action()
            except Exception as error:
                failure, box[1] = error, f"rank 0: {error}"
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise UserError(str(box[1]))
        return box[0]  # type: ignore[return-value]

    def divided(self, workers: int) -> World:
        """This rank's place in one of `workers` equal groups of consecutive ranks; called on every rank.

        Inside a group gradients are exchanged at every step; between groups an outer loop does what it
        does (`outer.team.comm_of`). Raises UserError when the ranks do not divide.
        """
        if workers == 1:
            return self
        if workers < 1 or self.size % workers:
            raise UserError(f"{self.size} ranks do not divide into {workers} workers of equal size")
        size = self.size // workers
        mesh = init_device_mesh(self.device.type, (workers, size), mesh_dim_names=("worker", "rank"))
        worker, rank = divmod(self.rank, size)
        return World(rank, size, self.device, mesh["rank"].get_group(), worker, workers)


ALONE = World()


@contextlib.contextmanager
def joined(timeout_s: float = 600.0) -> Iterator[World]:
    """The world that torchrun describes, or a world of one; leaves the process group at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size > 1:
        # One group with two backends: tensors where they are, Python objects on the CPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank, size, device)
    finally:
        if size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def no_sync(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients are exchanged in the backward pass of the last micro batch only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 compute over fp32 parameters, on CPU and CUDA alike; nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers depend on (seed, step, rank) alone, so a resumed run draws the same ones."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)
