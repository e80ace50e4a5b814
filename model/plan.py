"""From the grammar to a plan (`model.items`): which bank module is visited at which site.

Bank names do not depend on what comes after them, so a model's names are a prefix of those of the model
grown from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from model.items import Bracket, Cross, Fade, Item, ModuleSpec, Plan, Visit, walk
from model.registry import BLOCKS, did_you_mean, make_block
from model.schema import (
    BlockNode,
    Config,
    ConfigError,
    MemorySpec,
    MirrorNode,
    Node,
    OnionNode,
    RepeatNode,
    ShellNode,
    UseNode,
    WrapNode,
    YocoNode,
)

__all__ = ["Bracket", "Cross", "Fade", "Item", "ModuleSpec", "Plan", "Visit", "make_plan"]


def make_plan(config: Config) -> Plan:
    """The plan of a configuration. Raises ConfigError with the place in the file."""
    builder = _Builder()
    items = builder.settle(builder.nodes(config.stack, config.dim), config)
    if builder.errors:
        raise ConfigError(builder.errors)
    onion = next((n for n in config.stack if isinstance(n, OnionNode)), None)
    return Plan(items, builder.modules, freeze_input=bool(onion and onion.onion[0].frozen))


@dataclass(frozen=True)
class _Place:
    """Prefixes of site paths and of module names, the shell that is being built, the memory in reach."""

    site: str = ""
    module: str = "b"
    shell: ShellNode | None = None
    memory: MemorySpec | None = None


class _Builder:
    """Collects bank modules, labels and errors while the grammar is walked once."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleSpec] = {}
        self.labels: dict[str, str] = {}
        self.errors: list[str] = []
        self._sites: set[str] = set()
        self._counts: dict[str, int] = {}
        self._skips: dict[str, YocoNode] = {}  # by site of the memory

    # -- naming

    def _module(self, name: str, spec: ModuleSpec) -> str:
        if name in self.modules:
            self.errors.append(f"{spec.mark}: two parts of the model want the name {name!r}; rename one")
        self.modules[name] = spec
        return name

    def _numbered(self, at: _Place, name: str) -> str:
        n = self._counts.get(at.module, 0)
        self._counts[at.module] = n + 1
        return f"{at.module}{n}_{name}"

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
            elif isinstance(node, MirrorNode):
                out.extend(self._tied(node.mirror, 2, "cycle_rev", dim, at))
            elif isinstance(node, OnionNode):
                out.extend(self._onion(node, dim))
            elif isinstance(node, WrapNode):
                out.append(self._wrap(node, dim, at))
            elif isinstance(node, YocoNode):
                out.extend(self._yoco(node, dim, at))
            else:
                raise TypeError(f"the plan knows no node {type(node).__name__}")
        return tuple(out)

    def _block(self, node: BlockNode, dim: int, at: _Place) -> Visit:
        if node.as_ is None:
            name = self._numbered(at, node.name)
        else:
            name = self.labels[node.as_] = node.as_
        params = self._reader(node, dim, at) if _reads_memory(node.name) else node.params
        frozen, shell = (at.shell.frozen, at.shell.name) if at.shell else (False, None)
        self._module(name, ModuleSpec("block", node.name, dim, params, frozen, shell, node.mark))
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
        if _reads_memory(self.modules[name].name) and at.memory is None:
            self.errors.append(f"{node.mark}: {node.use!r} reads a memory: {_NO_MEMORY}")
        return [Visit(self._site(at.site + name), name)]

    def _repeat(self, node: RepeatNode, dim: int, at: _Place) -> list[Item]:
        if node.repeat < 1:
            self.errors.append(f"{node.mark}: repeat: {node.repeat}: want at least 1")
            return []
        if node.tied:
            return self._tied(node.of, node.repeat, node.order, dim, at)
        return [item for _ in range(node.repeat) for item in self.nodes(node.of, dim, at)]

    def _tied(self, nodes: list[Node], times: int, order: str, dim: int, at: _Place) -> list[Item]:
        """Every unit of a list `times` times: an entry, or a round of an entry that is an untied repeat."""
        units: list[tuple[Item, ...]] = []
        for node in nodes:
            if isinstance(node, RepeatNode) and not node.tied:
                units.extend(self.nodes(node.of, dim, at) for _ in range(node.repeat))
            else:
                units.append(self.nodes([node], dim, at))
        once = range(len(units))
        if order == "sequence":
            visits = [i for i in once for _ in range(times)]
        else:
            visits = [*once] * times
            if order == "cycle_rev" and times > 1:
                visits[-len(units) :] = reversed(once)
        out: list[Item] = []
        seen: set[int] = set()
        for i in visits:
            out.extend(self._again(units[i]) if i in seen else units[i])
            seen.add(i)
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
            elif isinstance(item, Cross):
                out.append(Cross(site, item.module, self._again(item.inner, rename)))
            else:
                out.append(Fade(site, item.module, self._again(item.inner, rename), item.residual))
        return tuple(out)

    def _wrap(self, node: WrapNode, dim: int, at: _Place) -> Bracket:
        spec = node.wrap
        name = self._numbered(at, spec.by.name)
        params = {**spec.by.params, "width": spec.width}
        frozen, shell = (at.shell.frozen, at.shell.name) if at.shell else (False, None)
        self._module(name, ModuleSpec("wrap", spec.by.name, dim, params, frozen, shell, spec.by.mark))
        site = self._site(at.site + name)
        return Bracket(site, name, self.nodes(spec.inner, spec.width or dim, replace(at, memory=None)))

    # -- yoco

    def _yoco(self, node: YocoNode, dim: int, at: _Place) -> tuple[Item, ...]:
        """The self half, then the memory with the cross half inside (arXiv 2405.05254)."""
        spec = node.yoco
        own = self.nodes(spec.self_, dim, at)
        memory, mark = spec.memory, spec.memory.mark
        width, heads = memory.head_dim, dim // memory.head_dim
        if dim % width or heads % memory.group or (width % 2 and memory.position == "rope"):
            self.errors.append(
                f"{mark}: head_dim: {width}, group: {memory.group} at width {dim}: head_dim must divide the"
                " width (and be even for RoPE), and group the query heads"
            )
            return own
        params = {
            "head_dim": width,
            "heads": heads // memory.group,
            "position": memory.position,
            "theta": memory.theta,
        }
        frozen, shell = (at.shell.frozen, at.shell.name) if at.shell else (False, None)
        name = self._numbered(at, "memory")
        self._module(name, ModuleSpec("memory", "memory", dim, params, frozen, shell, mark))
        site = self._site(at.site + name)
        inner = self.nodes(spec.cross, dim, replace(at, memory=memory))
        if not self.errors and not any(self._reads(item) for item in walk(inner)):
            self.errors.append(f"{node.mark}: nothing in `cross` reads the memory; want an xattn there")
        self._skips[site] = node
        return (*own, Cross(site, name, inner))

    def _reads(self, item: Item) -> bool:
        return isinstance(item, Visit) and _reads_memory(self.modules[item.module].name)

    def _reader(self, node: BlockNode, dim: int, at: _Place) -> dict:
        """Parameters of a block that reads the memory: its head width is the memory's."""
        if at.memory is None:
            self.errors.append(f"{node.mark}: {node.name} reads a memory: {_NO_MEMORY}")
            return node.params
        width, group = at.memory.head_dim, at.memory.group
        given, kv = node.params.get("head_dim") or width, dim // width // group
        heads = node.params.get("heads") or dim // width
        if given != width or heads % max(kv, 1):
            self.errors.append(
                f"{node.mark}: {node.name} has {heads} heads of width {given}, but the memory has {kv} of"
                f" width {width}: widths must be equal and the memory's heads divide the block's"
            )
        return {**node.params, "head_dim": width}

    def settle(self, items: tuple[Item, ...], config: Config) -> tuple[Item, ...]:
        """Decide where a prefill may skip the cross half: where nothing needs its other tokens."""
        out = list(items)
        for site, node in self._skips.items():
            i = next((i for i, item in enumerate(items) if item.site == site), None)
            why = None if self.errors else self._why_not(items, i, config)
            if why is not None and node.yoco.skip == "on":
                self.errors.append(f"{node.mark}: skip: on, but {why}; use `skip: auto`")
            if i is not None and why is None and node.yoco.skip != "off":
                out[i] = replace(out[i], skip=True)  # type: ignore[arg-type]
        return tuple(out)

    def _why_not(self, items: tuple[Item, ...], i: int | None, config: Config) -> str | None:
        """Why the cross half of item i has to see every token of a prompt, or None."""
        if i is None:
            return "this yoco stands inside another one or inside a bracket, which needs every token"
        if i + 1 < len(items):
            return "something follows this yoco and needs every token"
        for item in walk(items[i].inner):  # type: ignore[union-attr]
            spec = self.modules[item.module]
            if isinstance(item, Bracket | Cross) or (isinstance(item, Visit) and _keeps_state(spec)):
                return f"{spec.name} in its cross half ({spec.mark}) keeps a state, which needs every token"
        for name, head in config.heads.items():
            if head.ffn is not None and _keeps_state(ModuleSpec("block", "mlp", config.dim, head.ffn)):
                return f"the head {name!r} keeps a state, which needs every token"
        return None

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


_NO_MEMORY = "it stands in no `cross` half of a yoco (a bracket in between hides the memory)"


def _reads_memory(name: str) -> bool:
    return getattr(BLOCKS.get(name), "reads_memory", False)


def _keeps_state(spec: ModuleSpec) -> bool:
    """Whether such a block has a state, tried on the meta device, which takes no memory."""
    with torch.device("meta"):
        block = make_block(spec.name, spec.dim, **spec.params)
        return block.init_state(1, torch.empty(())) is not None
