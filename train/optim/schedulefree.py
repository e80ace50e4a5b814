"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), from the `schedulefree` package.

    y = (1-b) z + b x      where gradients are taken: the model's parameters while it trains
    z = z - lr AdamW(y)    x = (1-c) x + c z      what is evaluated, saved and sent

The package turns y into x and back by arithmetic that rounds, so that evaluating would change the training.
Here y is put aside and put back: an evaluation leaves no trace, and a checkpoint holds x as the model and y
beside the moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor

from train.optim.groups import Group


class ScheduleFree(AdamWScheduleFree):
    """The package's optimizer, always in training mode. Group keys hold its counters."""

    def __init__(self, groups: list[Group], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, foreach=False)
        self.train()

    @torch.no_grad()
    def averages(self) -> dict[Tensor, Tensor]:
        """{parameter: x}, freshly made; a parameter that was never stepped is its own average."""
        out = {}
        for group in self.param_groups:
            back = 1 - 1 / group["betas"][0]
            for p in group["params"]:
                z = self.state.get(p, {}).get("z")
                if z is not None:
                    out[p] = torch.lerp(p.detach(), z, back)
        return out


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[bool]:
    """Within, a schedule-free optimizer's parameters are the average x; afterwards y again, bit for bit.

    Nothing happens for any other optimizer. Gives whether anything was swapped.
    """
    if not isinstance(optimizer, ScheduleFree):
        yield False
        return
    kept = {}
    with torch.no_grad():
        for p, x in optimizer.averages().items():
            kept[p] = p.detach().clone()
            p.copy_(x)
    try:
        yield True
    finally:
        with torch.no_grad():
            for p, y in kept.items():
                p.copy_(y)
