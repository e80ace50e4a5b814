"""How a model is spread over the ranks of a worker, and how its tensors come together again.

    ddp     every rank holds the model; gradients are averaged (DistributedDataParallel)
    fsdp2   parameters, gradients and moments are cut among all ranks (Zhao et al. 2023; torch's fully_shard)
    hybrid  cut among `run.shard` consecutive ranks, repeated over the groups of so many (HSDP)

Every parameter is cut along its first dimension. Modules are gathered one group at a time: an onion's shell
is one group, any other bank module is its own, and what is left (table, heads) belongs to the root. A module
that is visited twice is gathered twice; its gradient is the sum of both visits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.lm import LanguageModel
from model.schema import ConfigError
from model.sections import RunConfig
from train.world import World


def parallel(lm: LanguageModel, run: RunConfig, world: World) -> nn.Module:
    """What is called in place of `lm`, so that its backward pass averages gradients over the ranks.

    Freeze, load and compile before calling this. Sharding changes `lm` in place and returns it.
    Raises ConfigError when `run.shard` does not divide the ranks.
    """
    if run.parallel == "ddp" or world.size == 1:
        if world.size == 1:
            return lm
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(
            lm, device_ids=ids, process_group=world.group, gradient_as_bucket_view=True
        )
    mesh = mesh_of(run, world)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": run.reshard}
    for modules in groups(lm):
        fully_shard(modules, **options)
    fully_shard(lm, **options)
    return lm


def mesh_of(run: RunConfig, world: World) -> DeviceMesh:
    """The ranks of this worker as FSDP2 wants them: (shard,), or (replicate, shard) for hybrid."""
    shard = world.size if run.parallel == "fsdp2" else run.shard or world.size
    if world.size % shard:
        raise ConfigError([f"run.shard: {shard} ranks a shard group do not divide {world.size} ranks"])
    shape, names = (world.workers, world.size // shard, shard), ("worker", "replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)  # on every rank of the launch
    return mesh["replicate", "shard"] if run.parallel == "hybrid" else mesh["shard"]


def groups(lm: LanguageModel) -> list[list[nn.Module]]:
    """Bank modules that are gathered together, in order of first visit; those without weights need not be."""
    out: dict[str, list[nn.Module]] = {}
    for name, spec in lm.plan.modules.items():
        if any(True for _ in lm.bank[name].parameters()):
            key = f"shell {spec.shell}" if spec.shell is not None else name
            out.setdefault(key, []).append(lm.bank[name])
    return list(out.values())


def sharded(module: nn.Module) -> bool:
    """Whether every rank must call the module for one of them to get its result."""
    return isinstance(module, FSDPModule)


def settle(module: nn.Module) -> None:
    """Free gathered weights after a forward pass without a backward pass: the next one reads the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(value: Tensor) -> Tensor:
    """A sharded tensor's full value, on every rank (called on every rank); others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, own: Tensor) -> Tensor:
    """A copy of `value` [as `own`], on its device, cut as `own` is cut; no rank waits for another."""
    if not isinstance(own, DTensor):
        return value.to(own.device, copy=True)
    # src_data_rank=None: every rank cuts its part out of its own copy
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).clone()


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(t, DTensor) and not all(map(_is_whole, t.placements)) for t in tensors)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the full tensors."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


def _is_whole(placement: Any) -> bool:
    return isinstance(placement, Replicate)
