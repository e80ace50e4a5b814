"""One pass through the sites of a plan: states in, states out, by-products.

Shape legend: B batch  T time  D width of the stream
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from model.blocks.memory import last_queries
from model.core import NO_AUX, Aux, Ctx, State, Step, merge_aux
from model.items import Bracket, Cross, Item, Visit

States = dict[str, Any]  # site path -> the state of that site
# site path -> how its module is called there in training: (module, x, ctx) -> its step
Around = Mapping[str, Callable[[nn.Module, Tensor, Ctx], Step]]


@dataclass
class Pass:
    """A pass at one length: every bracket opens another one that shares states and by-products.

    states: by site, or None: no state comes in, and none goes out.
    last:   only each row's last position matters to the caller.
    around: visits that are called in another way (checkpointed, say); without states alone.
    """

    bank: nn.ModuleDict
    ctx: Ctx
    states: States | None = None
    last: bool = False
    around: Around = field(default_factory=dict)
    out: States = field(default_factory=dict)
    aux: list[Aux] = field(default_factory=list)

    def state(self, site: str) -> State | None:
        return None if self.states is None else self.states.get(site)

    def keep(self, site: str, state: State | None, aux: Aux = NO_AUX) -> None:
        if self.states is not None:
            self.out[site] = state
        if aux is not NO_AUX:
            self.aux.append(aux.under(site))

    def run(self, items: tuple[Item, ...], x: Tensor) -> Tensor:
        """x [B, T, D] through the items. Where a cross half was skipped, only [B, 1, D] is left."""
        for item in items:
            module = self.bank[item.module]
            if isinstance(item, Visit):
                call = self.around.get(item.site)
                ctx = self.ctx if item.visit is None else replace(self.ctx, visit=item.visit)
                step = module(x, self.state(item.site), ctx) if call is None else call(module, x, ctx)
                self.keep(item.site, step.state, step.aux)
                x = step.y
            elif isinstance(item, Bracket):
                x = self._turned(item, module, x) if item.turned else self._bracket(item, module, x)
            elif isinstance(item, Cross):
                x = self._cross(item, module, x)
            else:
                step = module(x, self.run(item.inner, x), item.residual, self.ctx.docs)
                self.keep(item.site, None, step.aux)
                x = step.y
        return x

    def _bracket(self, item: Bracket, module: nn.Module, x: Tensor) -> Tensor:
        entered = module("enter", x, self.state(item.site), self.ctx)
        code = replace(self, ctx=entered.ctx or self.ctx).run(item.inner, entered.code)
        step = module("exit", code, entered.saved, entered.state, self.ctx)
        self.keep(item.site, step.state, merge_aux([entered.aux, step.aux]))
        return step.y

    def _turned(self, item: Bracket, module: nn.Module, x: Tensor) -> Tensor:
        """Out of the code, through the inside at the outer width, and back onto the code's grid."""
        inner = self.run(item.inner, module("exit", x, None, None, self.ctx).y)
        entered = module("enter", inner, None, self.ctx)
        self.keep(item.site, None, entered.aux)
        return entered.code

    def _cross(self, item: Cross, module: nn.Module, x: Tensor) -> Tensor:
        """Write the memory from every token, then read it from every token, or from the last alone."""
        memory, state, aux = module(x, self.state(item.site), self.ctx)
        self.keep(item.site, state, aux)
        inside = replace(self.ctx, memory=memory)
        if item.skip and self.last and x.shape[1] > 1:
            x, inside = last_queries(x, self.ctx, memory)
            self.ctx = replace(inside, memory=None)  # so it is for the heads, which alone follow
        return replace(self, ctx=inside).run(item.inner, x)
