"""A block that reads a memory, with a memory of its own tokens around it: so the laws can judge the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from model.blocks.xattn import KVMemory
from model.core import Block, Cost, Ctx, State, Step


class Remembering(Block):
    """y = block(x) with the memory that is written from x; the state is the memory's. group: heads that share
    one of the memory's."""

    def __init__(self, block: Block, group: int, **memory: Any) -> None:
        super().__init__(block.dim)
        self.memory = KVMemory(
            block.dim, head_dim=block.head_dim, heads=max(block.heads // group, 1), **memory
        )
        self.block = block

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        return self.memory.init_state(batch, like, capacity)

    def forward(self, x: Tensor, state: State = None, ctx: Ctx | None = None) -> Step:
        memory, after = self.memory(x, state, ctx)
        step = self.block(x, None, replace(ctx or Ctx(), memory=memory))
        return step._replace(state=after)

    def cost(self, T: int) -> Cost:
        return self.memory.cost(T) + self.block.cost(T)


def remembering(**memory: Any) -> Callable[[Block], Block]:
    return lambda block: Remembering(block, **memory)
