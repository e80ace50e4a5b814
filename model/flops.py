"""Floating-point operations, counted from structure: Linears from the modules, the rest from `cost`.

A multiply-add is 2. The backward pass is counted exactly: the gradient of an input costs as much as the
forward pass, that of the weights as much again, and neither is made where nothing before (after) a site
is trained. Recomputation and element-wise work are not counted, nor is the map behind pretrained rows,
which is applied once per pass to the table and not once per token.

Shape legend: T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from model.core import Bottleneck, Cost
from model.items import Bracket, Cross, Fade, Item, Visit

if TYPE_CHECKING:
    from model.lm import LanguageModel


@dataclass(frozen=True)
class SiteCost:
    """One visit: forward FLOPs of a row of T tokens, training FLOPs, and the state it keeps."""

    site: str
    module: str
    forward: float
    training: float
    cost: Cost


def linear_flops(module: nn.Module) -> float:
    """Forward FLOPs per token of all Linears below a module."""
    return sum(2.0 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def site_costs(lm: LanguageModel, T: int) -> list[SiteCost]:
    """Cost of every site in order of execution, then of the heads, for one row of T tokens."""
    counter = _Counter(lm)
    counter.items(lm.plan.items, T)
    counter.heads(T)
    return counter.out


def flops_per_token(lm: LanguageModel, T: int) -> float:
    """Training FLOPs (forward and backward) per token at context T."""
    return sum(c.training for c in site_costs(lm, T)) / max(T, 1)


class _Counter:
    """Walks the plan in order; `live` says whether anything before this site is trained."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        embed = lm.embed
        self.live = any(p is not None and p.requires_grad for p in (embed.weight, embed.project))
        self.table_trained = self.live if embed.unembed is None else embed.unembed.requires_grad
        self.out: list[SiteCost] = []

    def add(
        self,
        site: str,
        name: str,
        module: nn.Module,
        T: int,
        cost: Cost,
        extra: float = 0.0,
        linear: float | None = None,
    ) -> None:
        """extra: forward FLOPs of one more weight matmul, whose weight is trained if the table is.
        linear: of the module's Linears; None: each is used once a token."""
        linear = linear_flops(module) * T if linear is None else linear
        trained = any(p.requires_grad for p in module.parameters())
        training = linear + cost.flops + extra
        if self.live or trained:
            # Beyond Linears nothing is a weight gradient: the backward of that is twice its forward.
            training += 2.0 * cost.flops + extra
        training += linear * (self.live + trained) + extra * self.table_trained
        self.out.append(SiteCost(site, name, linear + cost.flops + extra, training, cost))
        self.live = self.live or trained

    def items(self, items: tuple[Item, ...], T: int) -> None:
        for item in items:
            module: Any = self.lm.bank[item.module]
            if isinstance(item, Visit):
                self.add(item.site, item.module, module, T, module.cost(T))
            elif isinstance(item, Bracket):
                assert isinstance(module, Bottleneck)
                self.add(item.site, item.module, module, T, module.cost(T))
                self.items(item.inner, int(T // module.merge))
            elif isinstance(item, Cross):
                self.add(item.site, item.module, module, T, module.cost(T))
                self.items(item.inner, T)
            elif isinstance(item, Fade):
                self.items(item.inner, T)

    def heads(self, T: int) -> None:
        """Every head reads the same trunk, and multiplies by the same table."""
        trunk = self.live
        for name, head in self.lm.named_heads():
            self.live = trunk
            cost = head.cost(T, self.lm.vocab)
            self.add(f"heads.{name}", name, head, T, cost.rest, cost.table, cost.linear)
