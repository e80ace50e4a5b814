"""From the grammar to a plan: which bank module is visited at which site.

The plan is plain data. Weights live once, by name, in the bank; a plan item says where they are used:

    Visit(site, module)            x -> x + block(norm(x)), or a bare block
    Bracket(site, module, inner)   enter ... exit; `turned` runs exit first (reading: whole)
    Fade(site, module, inner)      x -> (1-s) x + s inner(x), or x + s inner(x) for a residual shell

Sharing, growing, freezing, counting and checkpoints read this and need no special case. Bank names do
not depend on what comes after them, so a model's names are a prefix of those of the model grown from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from model.registry import BLOCKS, did_you_mean
from model.schema import (
    BlockNode,
    Config,
    ConfigError,
    Mark,
    Node,
    OnionNode,
    RepeatNode,
    ShellNode,
    UseNode,
)


@dataclass(frozen=True)
class ModuleSpec:
    """How one bank module is built.

    kind:  block | quant | adapter | fade.     name: registered name (blocks, quantizers).
    dim:   width outside.                      shell: the onion shell that it belongs to, if any.
    """

    kind: Literal["block", "quant", "adapter", "fade"]
    name: str
    dim: int
    params: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    shell: str | None = None
    mark: Mark = Mark()


@dataclass(frozen=True)
class Visit:
    site: str
    module: str


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


Item = Visit | Bracket | Fade


@dataclass(frozen=True)
class Plan:
    """items in order; bank modules by name, in order of first visit; whether the embedding's own linear
    map stays frozen because the first shell, which reads it, is frozen."""

    items: tuple[Item, ...]
    modules: dict[str, ModuleSpec]
    freeze_input: bool = False

    def walk(self) -> Iterator[Item]:
        """Every item, outer before inner, in order of execution."""
        yield from _walk(self.items)

    def sites(self) -> dict[str, str]:
        """Site path -> bank module name, in order."""
        return {item.site: item.module for item in self.walk()}


def _walk(items: tuple[Item, ...]) -> Iterator[Item]:
    for item in items:
        yield item
        if not isinstance(item, Visit):
            yield from _walk(item.inner)


def make_plan(config: Config) -> Plan:
    """The plan of a configuration. Raises ConfigError with the place in the file."""
    builder = _Builder()
    items = builder.nodes(config.stack, config.dim)
    if builder.errors:
        raise ConfigError(builder.errors)
    onion = next((n for n in config.stack if isinstance(n, OnionNode)), None)
    return Plan(items, builder.modules, freeze_input=bool(onion and onion.onion[0].frozen))


@dataclass(frozen=True)
class _Place:
    """Prefixes of site paths and of module names, and the shell that is being built."""

    site: str = ""
    module: str = "b"
    shell: ShellNode | None = None


class _Builder:
    """Collects bank modules, labels and errors while the grammar is walked once."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleSpec] = {}
        self.labels: dict[str, str] = {}
        self.errors: list[str] = []
        self._sites: set[str] = set()
        self._counts: dict[str, int] = {}

    # -- naming

    def _module(self, name: str, spec: ModuleSpec) -> str:
        if name in self.modules:
            self.errors.append(f"{spec.mark}: two parts of the model want the name {name!r}; rename one")
        self.modules[name] = spec
        return name

    def _site(self, path: str) -> str:
        site, n = path, 2
        while site in self._sites:
            site, n = f"{path}#{n}", n + 1
        self._sites.add(site)
        return site

    # -- grammar

    def nodes(self, nodes: list[Node], dim: int, at: _Place | None = None) -> tuple[Item, ...]:
        """Items of a list of nodes at width `dim`, in a place of the model (None: the top level)."""
        at = at or _Place()
        out: list[Item] = []
        for node in nodes:
            if isinstance(node, BlockNode):
                out.append(self._block(node, dim, at))
            elif isinstance(node, UseNode):
                out.extend(self._use(node, dim, at))
            elif isinstance(node, RepeatNode):
                out.extend(self._repeat(node, dim, at))
            elif isinstance(node, OnionNode):
                out.extend(self._onion(node, dim))
            else:
                raise TypeError(f"the plan knows no node {type(node).__name__}")
        return tuple(out)

    def _block(self, node: BlockNode, dim: int, at: _Place) -> Visit:
        check = getattr(BLOCKS.get(node.name), "validate", None)
        if check is not None:
            try:
                check(dim, **node.params)
            except ValueError as error:
                self.errors.append(f"{node.mark}: {node.name}: {error}")
        if node.as_ is None:
            n = self._counts.get(at.module, 0)
            self._counts[at.module] = n + 1
            name = f"{at.module}{n}_{node.name}"
        else:
            name = self.labels[node.as_] = node.as_
        frozen, shell = (at.shell.frozen, at.shell.name) if at.shell else (False, None)
        self._module(name, ModuleSpec("block", node.name, dim, node.params, frozen, shell, node.mark))
        return Visit(self._site(at.site + name), name)

    def _use(self, node: UseNode, dim: int, at: _Place) -> list[Item]:
        name = self.labels.get(node.use)
        if name is None:
            self.errors.append(
                f"{node.mark}: no block was named {node.use!r} before this"
                f"{did_you_mean(node.use, self.labels)}; name one with `as: {node.use}`"
            )
            return []
        if self.modules[name].dim != dim:
            self.errors.append(
                f"{node.mark}: {node.use!r} has width {self.modules[name].dim}, but the stream here has {dim}"
            )
        return [Visit(self._site(at.site + name), name)]

    def _repeat(self, node: RepeatNode, dim: int, at: _Place) -> list[Item]:
        if node.repeat < 1:
            self.errors.append(f"{node.mark}: repeat: {node.repeat}: want at least 1")
            return []
        first = self.nodes(node.of, dim, at)
        out = list(first)
        for _ in range(node.repeat - 1):
            out.extend(self._again(first) if node.tied else self.nodes(node.of, dim, at))
        return out

    def _again(self, items: tuple[Item, ...], rename: tuple[str, str] | None = None) -> tuple[Item, ...]:
        """The same modules at new sites."""
        out: list[Item] = []
        for item in items:
            path = item.site.split("#")[0]
            site = self._site(path.replace(*rename) if rename else path)
            if isinstance(item, Visit):
                out.append(Visit(site, item.module))
            elif isinstance(item, Bracket):
                out.append(Bracket(site, item.module, self._again(item.inner, rename), item.turned))
            else:
                out.append(Fade(site, item.module, self._again(item.inner, rename), item.residual))
        return tuple(out)

    # -- onion

    def _onion(self, node: OnionNode, dim: int) -> tuple[Item, ...]:
        names = [s.name for s in node.onion]
        for i, shell in enumerate(node.onion):
            if shell.name in names[:i]:
                self.errors.append(
                    f"{shell.mark}: a second shell called {shell.name!r}; shell names are unique"
                )
            if shell.merge > 1 and not shell.residual:
                self.errors.append(
                    f"{shell.mark}: merge: {shell.merge} without `residual: true`: only one position in"
                    f" {shell.merge} would ever see its own token; outer codes must bypass a shorter shell"
                )
            if i == 0 and (shell.merge > 1 or shell.residual or shell.width not in (None, dim)):
                self.errors.append(f"{shell.mark}: the outermost shell takes no merge, residual or width")
            if node.reading == "whole" and (shell.merge > 1 or shell.width not in (None, dim)):
                self.errors.append(
                    f"{shell.mark}: `reading: whole` keeps width and length; drop width and merge"
                )
        if self.errors:
            return ()
        return self._shell(node, 0, dim)

    def _shell(self, onion: OnionNode, i: int, dim: int) -> tuple[Item, ...]:
        """f_i, enter q_i, everything further in, exit q_i, f_i, at width `dim`."""
        shell = onion.onion[i]
        going_in = self.nodes(shell.body, dim, _Place(f"{shell.name}.in.", f"{shell.name}_", shell))
        if shell.tie:
            going_out = self._again(going_in, (f"{shell.name}.in.", f"{shell.name}.out."))
        else:
            going_out = self.nodes(shell.body, dim, _Place(f"{shell.name}.out.", f"{shell.name}_out_", shell))
        quant = self._module(
            f"{shell.name}_quant",
            ModuleSpec(
                "quant",
                shell.quant.name,
                dim,
                {**shell.quant.params, "channels": shell.to},
                shell.frozen,
                shell.name,
                shell.quant.mark if shell.quant.mark.line else shell.mark,
            ),
        )
        inner = self._inside(onion, i, dim, quant) if i + 1 < len(onion.onion) else ()
        return (*going_in, Bracket(self._site(f"{shell.name}.quant"), quant, inner), *going_out)

    def _inside(self, onion: OnionNode, i: int, dim: int, quant: str) -> tuple[Item, ...]:
        """What stands between the halves of quantizer i: the next shell, faded in."""
        outer, shell = onion.onion[i], onion.onion[i + 1]
        innermost = i + 2 == len(onion.onion)  # only the newest shell is faded in; the others are there
        if onion.reading == "whole":
            inner = self._shell(onion, i + 1, dim)
            bracket = Bracket(self._site(f"{outer.name}.requant"), quant, inner, turned=True)
        else:
            width = shell.width or dim
            adapter = self._module(
                f"{shell.name}_adapter",
                ModuleSpec(
                    "adapter",
                    "adapter",
                    outer.to,
                    {"width": width, "merge": shell.merge},
                    shell.frozen,
                    shell.name,
                    shell.mark,
                ),
            )
            inner = self._shell(onion, i + 1, width)
            bracket = Bracket(self._site(f"{shell.name}.adapter"), adapter, inner)
        fade = self._module(
            f"{shell.name}_fade",
            ModuleSpec(
                "fade",
                "fade",
                outer.to,
                {
                    "steps": shell.blend.steps if innermost else 0,
                    "hold": shell.blend.hold,
                    "code": shell.blend.code,
                },
                shell.frozen,
                shell.name,
                shell.mark,
            ),
        )
        return (Fade(self._site(f"{shell.name}.fade"), fade, (bracket,), shell.residual),)
