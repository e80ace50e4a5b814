"""The plan as plain data: which bank module is visited at which site.

Weights live once, by name, in the bank; an item says where they are used:

    Visit(site, module)            x -> x + block(norm(x)), or a bare block
    Bracket(site, module, inner)   enter ... exit; `turned` runs exit first (reading: whole)
    Fade(site, module, inner)      x -> (1-s) x + s inner(x), or x + s inner(x) for a residual shell
    Cross(site, module, inner)     the module makes a memory of x, which the blocks inside read

A state belongs to a site. Sharing, growing, freezing, counting and checkpoints read this and need no
special case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from model.schema import Mark


@dataclass(frozen=True)
class ModuleSpec:
    """How one bank module is built.

    kind:  block | quant | adapter | fade | memory | wrap.
    name:  registered name (blocks, quantizers, wraps).
    dim:   width outside.     shell: the onion shell that it belongs to, if any.
    """

    kind: Literal["block", "quant", "adapter", "fade", "memory", "wrap"]
    name: str
    dim: int
    params: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    shell: str | None = None
    mark: Mark = Mark()


@dataclass(frozen=True)
class Visit:
    """visit: of a module that is a bank of several sites' layers, which one; None for any other module."""

    site: str
    module: str
    visit: int | None = None


@dataclass(frozen=True)
class Bracket:
    site: str
    module: str
    inner: tuple[Item, ...] = ()
    turned: bool = False


@dataclass(frozen=True)
class Fade:
    site: str
    module: str
    inner: tuple[Item, ...] = ()
    residual: bool = False


@dataclass(frozen=True)
class Cross:
    """skip: a prefill that wants the last logits alone runs `inner` on each row's last token alone."""

    site: str
    module: str
    inner: tuple[Item, ...] = ()
    skip: bool = False


Item = Visit | Bracket | Fade | Cross


@dataclass(frozen=True)
class Plan:
    """items in order; bank modules by name, in order of first visit; whether the embedding's own linear
    map stays frozen because a frozen shell is the first to read it."""

    items: tuple[Item, ...]
    modules: dict[str, ModuleSpec]
    freeze_input: bool = False

    def walk(self) -> Iterator[Item]:
        """Every item, outer before inner, in order of execution."""
        yield from walk(self.items)

    def sites(self) -> dict[str, str]:
        """Site path -> bank module name, in order."""
        return {item.site: item.module for item in self.walk()}


def walk(items: tuple[Item, ...]) -> Iterator[Item]:
    """Every item, outer before inner, in order of execution."""
    for item in items:
        yield item
        if not isinstance(item, Visit):
            yield from walk(item.inner)
