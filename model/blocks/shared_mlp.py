"""A bank of hidden neurons that the feed-forward layers of several sites share, wholly or in part.

Shape legend: B batch  T time  D model width  F hidden neurons of a layer  r those of its own  L layers
              N neurons of the bank

A feed-forward layer is a sum over its neurons, so layers may share any part of them exactly:

    slide: false    layer l has the first F - r neurons, which all share, and r of its own
    slide: true     layer l has neurons l r .. l r + F - 1: each drops the oldest r and takes r new ones

Either way the bank has N = F + (L - 1) r neurons. r = F is no sharing, r = 0 one layer for all sites.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.mlp import MULT
from model.core import Block, Cost, Ctx, State, Step
from model.registry import block


@block("shared_mlp")
class SharedMLP(Block):
    """Layer l of a bank: x += W_out[l] (gain_l * act(W_in[l] rms_l(x))).

    Norms and gains (one a shared neuron, 1 at first) are each layer's own. All visits that name the same bank
    are its layers, in order.

    bank:   the bank's name; within an onion, a shell's own.
    fresh:  r / F, the share of a layer's neurons that are its own.
    slide:  see above.
    order:  each    every visit is a layer
            mirror  of n visits, number i and n - 1 - i are the same layer, as in an onion.
    act:    swiglu, gelu or relu2.     mult, multiple_of: as for `mlp`.
    visits: how many sites there are; the plan counts them.

    State: none.
    Raises ValueError for fresh outside [0, 1], an unknown act or order, and sizes below 1.
    """

    bare = True
    no_decay = ("norm", "gain")
    bank_of = "bank"  # the parameter that names what visits share

    def __init__(
        self,
        dim: int,
        *,
        bank: str = "ffn",
        fresh: float = 0.0,
        slide: bool = False,
        order: Literal["each", "mirror"] = "each",
        act: Literal["swiglu", "gelu", "relu2"] = "swiglu",
        mult: float | None = None,
        multiple_of: int = 1,
        norm_eps: float = 1e-6,
        visits: int = 1,
    ) -> None:
        super().__init__(dim)
        if not 0 <= fresh <= 1:
            raise ValueError(f"fresh={fresh}: a share of the neurons, from 0 to 1")
        if act not in ("swiglu", "gelu", "relu2") or order not in ("each", "mirror"):
            raise ValueError(f"act={act!r}, order={order!r}: want swiglu, gelu or relu2; each or mirror")
        mult = MULT[act] if mult is None else mult
        if mult <= 0 or multiple_of < 1 or visits < 1:
            raise ValueError(
                f"mult={mult} > 0, multiple_of={multiple_of} and visits={visits} >= 1, bank={bank!r}"
            )
        self.act, self.slide, self.order, self.visits = act, slide, order, visits
        self.hidden = max(1, round(mult * dim / multiple_of)) * multiple_of
        self.own = round(fresh * self.hidden)
        layers = visits if order == "each" else -(-visits // 2)
        self.neurons = self.hidden + (layers - 1) * self.own
        self.norm_eps = norm_eps
        self.norm = nn.Parameter(torch.ones(layers, dim))
        self.gate_proj = nn.Linear(dim, self.neurons, bias=False) if act == "swiglu" else None
        self.up_proj = nn.Linear(dim, self.neurons, bias=False)
        self.down_proj = nn.Linear(self.neurons, dim, bias=False)
        with torch.no_grad():  # as for F inputs
            self.down_proj.weight *= (self.neurons / self.hidden) ** 0.5
        self.down_proj.residual_out = True  # type: ignore[assignment]
        common = self.hidden if slide else self.hidden - self.own
        shared = layers > 1 and common > 0
        self.gain = nn.Parameter(torch.ones(layers, common)) if shared else None

    def forward(self, x: Tensor, state: State | None = None, ctx: Ctx | None = None) -> Step:
        visit = 0 if ctx is None else ctx.visit
        layer = visit if self.order == "each" else min(visit, self.visits - 1 - visit)
        h = F.rms_norm(x, (self.dim,), self.norm[layer].to(x.dtype), self.norm_eps)
        y, done = x, 0
        for low, high in self._ranges(layer):
            up = F.linear(h, self.up_proj.weight[low:high])
            if self.gate_proj is not None:
                up = F.silu(F.linear(h, self.gate_proj.weight[low:high])) * up
            else:
                up = F.gelu(up) if self.act == "gelu" else F.relu(up).square()
            if self.gain is not None and done < self.gain.shape[1]:
                up = up * self.gain[layer, done : done + high - low].to(up.dtype)
            y = y + F.linear(up, self.down_proj.weight[:, low:high]).to(x.dtype)
            done += high - low
        return Step(y, state)

    def _ranges(self, layer: int) -> list[tuple[int, int]]:
        """Where the layer's neurons stand in the bank: those that are shared first."""
        if self.slide:
            return [(layer * self.own, layer * self.own + self.hidden)]
        common = self.hidden - self.own
        start = common + layer * self.own
        return [(a, b) for a, b in ((0, common), (start, start + self.own)) if b > a]

    def cost(self, T: int) -> Cost:
        """Its Linears hold the whole bank, of which a visit uses F neurons."""
        matrices = 2 if self.gate_proj is None else 3
        return Cost(flops=-2.0 * T * self.dim * matrices * (self.neurons - self.hidden))
