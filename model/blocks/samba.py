"""Samba (Ren et al., arXiv 2406.07522): a recurrent layer, an MLP, a windowed attention layer, an MLP."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from model.core import Block, Cost, Ctx, State, Step, merge_aux
from model.ops.norm import RMSNorm
from model.registry import block, make_block


@block("samba")
class Samba(Block):
    """x += part(RMSNorm(x)) for the parts mamba2, mlp, swa, mlp.

    mamba2, swa, mlp: parameters of these blocks; both MLPs take the same.

    State: a tuple of the four parts' states.
    """

    bare = True

    def __init__(
        self,
        dim: int,
        *,
        mamba2: dict[str, Any] | None = None,
        swa: dict[str, Any] | None = None,
        mlp: dict[str, Any] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        plan = (("mamba2", mamba2), ("mlp", mlp), ("swa", swa), ("mlp", mlp))
        self.parts = nn.ModuleList(make_block(name, dim, **(params or {})) for name, params in plan)
        self.norms = nn.ModuleList(RMSNorm(dim, norm_eps) for _ in plan)

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State:
        return tuple(part.init_state(batch, like, capacity) for part in self._blocks())

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        states = (None,) * len(self.parts) if state is None else state
        after: list[State | None] = []
        auxes = []
        for i, (part, norm, s) in enumerate(zip(self._blocks(), self.norms, states)):
            step = part(norm(x), s, ctx)
            x = x + step.y
            after.append(step.state)
            auxes.append(step.aux.under(str(i)))
        return Step(x, None if state is None else tuple(after), merge_aux(auxes))

    def cost(self, T: int) -> Cost:
        return sum((part.cost(T) for part in self._blocks()), Cost())

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.parts))
