"""Parallel mixers at one site: heads of different kinds read the same tokens, and their outputs are mixed.

Shape legend: B batch  T time  D model width  n branches
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.core import Block, Cost, Ctx, State, Step, at_least_fp32, merge_aux
from model.registry import BLOCKS, Branches, block, make_block

DEFAULT = ("mamba2", "deltanet")


@block("mix")
class Mix(Block):
    """Several blocks of the same input, mixed into one output.

    of:      the branches, `name` or `{name: params}`; by default Mamba-2 heads beside DeltaNet heads. How
             many heads a branch has, and how wide they are, its own parameters say (`heads`, `expand`, ...).
    combine: norm  y = W_o mean_i (b_i * rms(y_i)), b_i [D] learned from 1: every branch counts alike at
                   first, whatever its scale (as Hymba's heads do, arXiv 2411.13676).
             sum   y = sum_i s_i y_i, s_i [1] learned from 1: heads side by side under one output matrix, of
                   which every branch owns its share.

    State: a tuple of the branches' states.
    Raises ValueError for fewer than two branches, and for a branch that brings its own residual or reads the
    memory of a yoco.
    """

    no_decay = ("scale",)

    def __init__(
        self,
        dim: int,
        *,
        of: Branches | None = None,
        combine: Literal["norm", "sum"] = "norm",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim)
        entries: list[dict[str, dict[str, Any]]] = [{name: {}} for name in DEFAULT] if of is None else of
        pairs = [pair for entry in entries for pair in entry.items()]
        if len(pairs) < 2:
            raise ValueError(f"of: want at least two blocks, got {[name for name, _ in pairs]}")
        if combine not in ("norm", "sum"):
            raise ValueError(f"combine={combine!r}: must be norm or sum")
        for name, _ in pairs:
            cls: Any = BLOCKS.get(name)
            if cls.bare or getattr(cls, "reads_memory", False):
                why = "brings its own residual" if cls.bare else "reads the memory of a yoco"
                raise ValueError(f"of: {name} {why}, so it cannot be a branch; give it an item of its own")
        self.names = [f"{i}_{name}" for i, (name, _) in enumerate(pairs)]
        self.parts = nn.ModuleList(make_block(name, dim, **params) for name, params in pairs)
        self.combine, self.norm_eps = combine, norm_eps
        width = dim if combine == "norm" else 1
        self.scale = nn.Parameter(torch.ones(len(pairs), width))
        self.o_proj = nn.Linear(dim, dim, bias=False) if combine == "norm" else None
        if self.o_proj is not None:
            for m in self.parts.modules():
                if getattr(m, "residual_out", False):
                    m.residual_out = False  # type: ignore[assignment]  # only o_proj writes to the stream
            self.o_proj.residual_out = True  # type: ignore[assignment]

    def init_state(self, batch: int, like: Tensor, capacity: int | None = None) -> State | None:
        return tuple(part.init_state(batch, like, capacity) for part in self._blocks())

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        states = (None,) * len(self.parts) if state is None else state
        steps = [part(x, s, ctx) for part, s in zip(self._blocks(), states)]
        y = self._mixed([step.y for step in steps]).to(x.dtype)
        after = None if state is None else tuple(step.state for step in steps)
        return Step(y, after, merge_aux(step.aux.under(name) for name, step in zip(self.names, steps)))

    def _mixed(self, ys: list[Tensor]) -> Tensor:
        if self.o_proj is None:
            return sum((s.to(y.dtype) * y for s, y in zip(self.scale, ys)), torch.zeros_like(ys[0]))
        with torch.autocast(ys[0].device.type, enabled=False):
            wide = [y.to(at_least_fp32(y.dtype)) for y in ys]
            normed = (
                F.rms_norm(y, (self.dim,), s.to(y.dtype), self.norm_eps) for s, y in zip(self.scale, wide)
            )
            mean = sum(normed, torch.zeros_like(wide[0])) / len(ys)
        return self.o_proj(mean.to(ys[0].dtype))

    def cost(self, T: int) -> Cost:
        return sum((part.cost(T) for part in self._blocks()), Cost())

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.parts))
