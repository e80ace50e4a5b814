"""One rank of `test_rank_tables`: moving averages of a model trained here alone, or with the other.

python -m tests.train.rank_tables RANK STORE OUT
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from model.ops.selection import Selector
from model.quant.base import upkeep
from model.registry import make_quantizer
from train.world import ALONE, World

D, STEPS = 16, 3


def rows(part: int, step: int) -> Tensor:
    """[1, 40, D] of one of two halves of a batch."""
    g = torch.Generator().manual_seed(10 * part + step)
    return torch.randn(1, 40, D, generator=g)


def tables(parts: list[int], world: World) -> dict[str, Tensor]:
    """Every moving average after some steps on these halves of the batches."""
    torch.manual_seed(0)
    kinds = {n: make_quantizer(n, D, channels=8, codes=16, dead=0.0) for n in ("vq", "rvq")}
    bank = nn.ModuleDict({**kinds, "selector": Selector(D, 0.5, 0.9)})
    for step in range(STEPS):
        for part in parts:
            x = rows(part, step)
            for name in kinds:
                bank[name]("enter", x)
            bank["selector"].choose(bank["selector"](x))
        upkeep(bank, world.ranks)
    return dict(bank.named_buffers())


def results(rank: int, store: Path) -> dict[str, Tensor]:
    """Of two workers of one rank each, and of one worker of two ranks."""
    torch.set_num_threads(1)
    where = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=600)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **where)
    try:
        launch, out = World(rank, 2), {}
        for workers in (2, 1):
            found = tables([rank], launch.divided(workers))
            out |= {f"{workers}/{n}": t.clone() for n, t in found.items()}
        return out
    finally:
        dist.destroy_process_group()


def one_process(parts: list[int]) -> dict[str, Tensor]:
    return tables(parts, ALONE)


if __name__ == "__main__":
    save_file(results(int(sys.argv[1]), Path(sys.argv[2])), sys.argv[3])
