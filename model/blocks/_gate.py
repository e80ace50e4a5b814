"""Gates per head: one number in (0, 1) per head and token, on what the head made, before the output matrix.

Shape legend: B batch  T time  D model width  H heads (or groups of hidden channels)  V channels of a head

A gate after attention adds the non-linearity that value and output matrices lack, and lets a head say
nothing, so that no token need serve as a sink (Qiu et al., arXiv 2505.06708).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.core import NO_AUX, Aux, Ctx, docs_of

OPEN = 4.0  # sigmoid(4) = 0.98: training starts from the block without gates


class HeadGate(nn.Linear):
    """g = sigmoid(W x + b) [B, T, H]; W = 0 and b = `bias` at first."""

    def __init__(self, dim: int, heads: int, bias: float = OPEN) -> None:
        super().__init__(dim, heads)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, bias)


def gated(gate: HeadGate | None, o: Tensor, x: Tensor, ctx: Ctx | None) -> tuple[Tensor, Aux]:
    """o [B, T, H * V] with every head scaled by its gate of x [B, T, D], and the gates' means; o for None."""
    return (o, NO_AUX) if gate is None else apply_gates(gate(x), o, ctx)


def apply_gates(logits: Tensor, o: Tensor, ctx: Ctx | None) -> tuple[Tensor, Aux]:
    """o [B, T, H * V] scaled by sigmoid(logits [B, T, H]).

    Statistics: `gate`, the mean over heads and tokens; `gate_low`, of the head that is closed the most.
    """
    g = logits.sigmoid()
    y = (o.unflatten(-1, (g.shape[-1], -1)) * g[..., None].to(o.dtype)).flatten(-2)
    if g.shape[1] <= 1:  # a decode step has nothing to average
        return y, NO_AUX
    docs = docs_of(ctx)
    with torch.no_grad():
        heads = (g if docs is None or not docs.padded else g[docs.tokens]).flatten(0, -2).float().mean(0)
        return y, Aux(stats={"gate": heads.mean(), "gate_low": heads.min()})


def head_gate(gate: bool, dim: int, heads: int) -> HeadGate | None:
    """The gate of a block whose parameter `gate` is that."""
    return HeadGate(dim, heads) if gate else None
