"""The small forms: a block, `use`, `repeat`, `mirror`, `wrap`."""

from __future__ import annotations

from dataclasses import replace

from model.items import Bracket, Item, Visit
from model.plan.builder import Builder, Place
from model.plan.yoco import check_use, reader_params, reads_memory
from model.registry import did_you_mean
from model.schema import BlockNode, MirrorNode, Node, RepeatNode, UseNode, WrapNode


def block(b: Builder, node: BlockNode, dim: int, at: Place) -> list[Item]:
    if node.as_ is None:
        name = b.numbered(at, node.name)
    else:
        name = b.labels[node.as_] = node.as_
    params = reader_params(b, node, dim, at) if reads_memory(node.name) else node.params
    b.module(name, at.spec("block", node.name, dim, params, node.mark))
    return [Visit(b.site(at.site + name), name)]


def use(b: Builder, node: UseNode, dim: int, at: Place) -> list[Item]:
    name = b.labels.get(node.use)
    if name is None:
        b.errors.append(
            f"{node.mark}: no block was named {node.use!r} before this"
            f"{did_you_mean(node.use, b.labels)}; name one with `as: {node.use}`"
        )
        return []
    if b.modules[name].dim != dim:
        b.errors.append(
            f"{node.mark}: {node.use!r} has width {b.modules[name].dim}, but the stream here has {dim}"
        )
    check_use(b, node, b.modules[name], at)
    return [Visit(b.site(at.site + name), name)]


def repeat(b: Builder, node: RepeatNode, dim: int, at: Place) -> list[Item]:
    if node.repeat < 1:
        b.errors.append(f"{node.mark}: repeat: {node.repeat}: want at least 1")
        return []
    if node.tied:
        return tied(b, node.of, node.repeat, node.order, dim, at)
    return [item for _ in range(node.repeat) for item in b.nodes(node.of, dim, at)]


def mirror(b: Builder, node: MirrorNode, dim: int, at: Place) -> list[Item]:
    return tied(b, node.mirror, 2, "cycle_rev", dim, at)


def tied(b: Builder, nodes: list[Node], times: int, order: str, dim: int, at: Place) -> list[Item]:
    """Every unit of a list `times` times: an entry, or a round of an entry that is an untied repeat."""
    units: list[tuple[Item, ...]] = []
    for node in nodes:
        if isinstance(node, RepeatNode) and not node.tied:
            units.extend(b.nodes(node.of, dim, at) for _ in range(node.repeat))
        else:
            units.append(b.nodes([node], dim, at))
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
        out.extend(b.again(units[i]) if i in seen else units[i])
        seen.add(i)
    return out


def wrap(b: Builder, node: WrapNode, dim: int, at: Place) -> list[Item]:
    spec = node.wrap
    name = b.numbered(at, spec.by.name)
    params = {**spec.by.params, "width": spec.width}
    b.module(name, at.spec("wrap", spec.by.name, dim, params, spec.by.mark))
    site = b.site(at.site + name)
    return [Bracket(site, name, b.nodes(spec.inner, spec.width or dim, replace(at, memory=None)))]
