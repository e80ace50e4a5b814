"""Workers of a run: who is one, where each keeps its folder, and what all must have in common.

diloco and streaming: the ranks of one launch, cut into `outer.workers` groups, are the workers. Each is a
run of its own in a folder of its own (RUN, RUN/workers/1, ...), so that saving and resuming need nothing new.
async: a launch is one worker.
"""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from model.config import dump, load
from model.schema import Config
from train import checkpoint
from train.errors import UserError
from train.outer.asynchronous import Async
from train.outer.diloco import DiLoCo
from train.outer.exchange import Alone, Collective, Comm
from train.outer.layout import fragments
from train.outer.lockstep import parts_of
from train.outer.none import NoOuter
from train.outer.streaming import Streaming
from train.world import World

LOCKSTEP = {"diloco": DiLoCo, "streaming": Streaming}
PACKAGES = ("model", "train", "dataset")
# What may differ between workers of one run.
LOCAL = (
    "outer.server",
    "outer.secret_file",
    "outer.worker",
    "wandb",
    "run.log_every",
    "run.keep",
    "run.micro",
)


def divide(world: World, arch: str, sets: list[str]) -> World:
    """This rank's worker, for the architecture's outer loop; called on every rank. Raises UserError."""
    outer = load(arch, sets).outer
    return world.divided(outer.workers or world.size) if outer.kind in LOCKSTEP else world


def folder(run: Path, world: World) -> Path:
    """A worker's own folder of a run."""
    return run / "workers" / str(world.worker) if world.worker else run


def parts(config: Config, world: World) -> int:
    """Into how many parts the data of a step is cut, a worker taking one at a time."""
    return config.outer.shards if config.outer.kind == "async" else world.workers


def make(config: Config, lm: nn.Module, world: World, run: Path, data: str) -> NoOuter:
    """The outer loop of a configuration. data: id of the view that is trained on."""
    kind = config.outer.kind
    if kind == "none":
        return NoOuter()
    identity = {"plan": plan_digest(config), "data": data[:32], "code": code_digest()}
    if kind == "async":
        name = config.outer.worker or f"{socket.gethostname()}-{_hash(str(run.resolve()))[:6]}"
        pieces, steps = fragments(lm), config.run.steps or 0
        return Async(config.outer, pieces, identity, steps, name, world.on_main)
    comm = comm_of(world)
    return LOCKSTEP[kind](config.outer, parts_of(lm, config.outer), comm, identity, world)


def comm_of(world: World) -> Comm:
    """A line of our own between the same rank of every worker; called on every rank of the launch."""
    if world.workers == 1:
        return Alone()
    mine = None
    for rank in range(world.size):
        group = dist.new_group([w * world.size + rank for w in range(world.workers)], backend="gloo")
        mine = group if rank == world.rank else mine
    return Collective(mine)


def resume_from(run: Path) -> Path | None:
    """The newest checkpoint that every rank of the launch sees whole in its worker's folder.

    None: nobody has any, and all begin together. Raises UserError when only some have: whoever lost a folder
    cannot go on, and the others must not begin anew over what they have.
    """
    newest = checkpoint.newest(run)[0]
    mine = [p.name for p in checkpoint.saved(run) if newest is not None and p.name <= newest.name]
    seen = _gather((str(run), mine))
    common = set.intersection(*(set(names) for _, names in seen))
    if not common and any(names for _, names in seen):
        lines = [f"  rank {i}: {folder}: {', '.join(n) or 'none'}\n" for i, (folder, n) in enumerate(seen)]
        raise UserError(
            f"no checkpoint that every rank has:\n{''.join(lines)}put the missing folder back (the "
            f"ranks of one worker must all see theirs), or begin anew in another folder with --run"
        )
    return max((p for p in checkpoint.saved(run) if p.name in common), default=None)


def counterpart(source: Path, world: World) -> Path:
    """What this worker takes over when worker 0 takes over `source`, a run or a checkpoint of it.

    Of a run it is the newest checkpoint that all have.
    """
    if checkpoint.NAME.fullmatch(source.name):
        return folder(source.parent.parent, world) / source.parent.name / source.name
    mine = folder(source, world)
    return resume_from(mine) or mine


def everywhere(flag: bool) -> bool:
    """Whether something holds on every rank of the launch. Also a place where they wait for each other."""
    return all(_gather(flag))


def _gather(value: Any) -> list[Any]:
    """What every rank of the launch says, in their order; called on every one."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def plan_digest(config: Config) -> str:
    """Hash of all that decides the numbers of a training run."""
    data = dump(config)
    for key in LOCAL:
        section, _, name = key.partition(".")
        if name:
            data.get(section, {}).pop(name, None)
        else:
            data.pop(section, None)
    return _hash(json.dumps(data, sort_keys=True))


def code_digest() -> str:
    """Hash of the sources of model, train and dataset, as they are on this machine."""
    root, h = Path(__file__).resolve().parents[2], hashlib.blake2b(digest_size=16)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            h.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return h.hexdigest()


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
