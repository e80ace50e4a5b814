"""What makes a block of one that cannot stand alone, so that the laws can judge it: a memory of its own
tokens around a block that reads one, and all visits of a bank of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from model.blocks.memory import make_memory
from model.core import Block, Cost, Ctx, State, Step


class Remembering(Block):
    """y = block(x) with the memory that is written from x; the state is the memory's and the block's. group:
    heads that share one of the memory's."""

    def __init__(self, block: Block, group: int, **memory: Any) -> None:
        super().__init__(block.dim)
        self.memory = make_memory(
            block.dim, head_dim=block.head_dim, heads=max(block.heads // group, 1), **memory
        )
        self.block = block

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        own = self.block.init_state(batch, like, capacity)
        return self.memory.init_state(batch, like, capacity), own

    def forward(self, x: Tensor, state: State = None, ctx: Ctx | None = None) -> Step:
        written, own = (None, None) if state is None else state
        memory, after, _ = self.memory(x, written, ctx)
        step = self.block(x, own, replace(ctx or Ctx(), memory=memory))
        return step._replace(state=None if state is None else (after, step.state))

    def cost(self, T: int) -> Cost:
        return self.memory.cost(T) + self.block.cost(T)


def remembering(**memory: Any) -> Callable[[Block], Block]:
    return lambda block: Remembering(block, **memory)


class Visiting(Block):
    """Every visit of a bank of layers, one after another."""

    bare = True

    def __init__(self, block: Block) -> None:
        super().__init__(block.dim)
        self.block = block

    def forward(self, x: Tensor, state: State = None, ctx: Ctx | None = None) -> Step:
        for visit in range(self.block.visits):
            x = self.block(x, None, replace(ctx or Ctx(), visit=visit)).y
        return Step(x)

    def cost(self, T: int) -> Cost:
        """The laws count the Linears once."""
        linears = sum(2.0 * m.weight.numel() * T for m in self.modules() if isinstance(m, nn.Linear))
        n = self.block.visits
        return Cost(n * self.block.cost(T).flops + (n - 1) * linears)


def visiting(block: Block) -> Block:
    return Visiting(block)
