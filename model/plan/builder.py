"""What every form of the grammar builds with: names, sites, labels, errors, and visiting things again.

A form is a function `(builder, node, dim, at) -> items`; `model.plan` has the table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from model.items import Item, ModuleSpec, Visit
from model.schema import MemorySpec, Node, ShellNode, YocoNode

_EMPTY = nn.ModuleDict()


@dataclass(frozen=True)
class Place:
    """Prefixes of site paths and of module names, the shell that is being built, the memory in reach.

    frozen: whether a form around it freezes what is built here.
    """

    site: str = ""
    module: str = "b"
    shell: ShellNode | None = None
    memory: MemorySpec | None = None
    frozen: bool = False

    def spec(self, kind: Any, name: str, dim: int, params: dict[str, Any], mark: Any) -> ModuleSpec:
        """A bank module that belongs to this place."""
        frozen, shell = (self.shell.frozen, self.shell.name) if self.shell else (False, None)
        return ModuleSpec(kind, name, dim, params, self.frozen or frozen, shell, mark)


Form = Callable[["Builder", Any, int, Place], Iterable[Item]]


class Builder:
    """Collects bank modules, labels and errors while the grammar is walked once.

    forms:  how each type of node becomes items.
    labels: bank modules by the name that `as` gave them.
    banks:  visits of each bank of layers, by its module.
    skips:  yoco nodes by the site of their memory.
    """

    def __init__(self, forms: dict[type, Form]) -> None:
        self.forms = forms
        self.modules: dict[str, ModuleSpec] = {}
        self.labels: dict[str, str] = {}
        self.errors: list[str] = []
        self.banks: dict[str, int] = {}
        self.skips: dict[str, YocoNode] = {}
        self._sites: set[str] = set()
        self._counts: dict[str, int] = {}

    def nodes(self, nodes: list[Node], dim: int, at: Place | None = None) -> tuple[Item, ...]:
        """Items of a list of nodes at width `dim`, in a place of the model (None: the top level)."""
        at = at or Place()
        return tuple(item for node in nodes for item in self.forms[type(node)](self, node, dim, at))

    def module(self, name: str, spec: ModuleSpec) -> str:
        """Put a module into the bank."""
        if name in self.modules:
            self.errors.append(f"{spec.mark}: two parts of the model want the name {name!r}; rename one")
        self.usable(name, spec.mark)
        self.modules[name] = spec
        return name

    def usable(self, name: str, place: object) -> None:
        """Report a name under which an `nn.ModuleDict` takes nothing: its weights could not be saved."""
        if not name or "." in name or hasattr(_EMPTY, name):
            self.errors.append(
                f"{place}: {name!r} cannot name a part of the model: want a name without dots that torch's"
                " ModuleDict does not use itself (as it does `keys` and `type`); rename it"
            )

    def numbered(self, at: Place, name: str) -> str:
        """`b3_mlp`: a bank name that counts within its place."""
        n = self._counts.get(at.module, 0)
        self._counts[at.module] = n + 1
        return f"{at.module}{n}_{name}"

    def site(self, path: str) -> str:
        """A site path that is not taken: `b3_mlp`, then `b3_mlp#2`."""
        site, n = path, 2
        while site in self._sites:
            site, n = f"{path}#{n}", n + 1
        self._sites.add(site)
        return site

    def again(self, items: tuple[Item, ...], rename: tuple[str, str] | None = None) -> tuple[Item, ...]:
        """The same modules at new sites."""
        out: list[Item] = []
        for item in items:
            path = item.site.split("#")[0]
            site = self.site(path.replace(*rename) if rename else path)
            if isinstance(item, Visit):
                out.append(replace(item, site=site))
            else:
                out.append(replace(item, site=site, inner=self.again(item.inner, rename)))
        return tuple(out)
