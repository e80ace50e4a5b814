"""The small forms: a block, `use`, `repeat`, `mirror`, `wrap`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model.items import Bracket, Item, Visit
from model.plan.builder import Builder, Place
from model.plan.yoco import check_use, reader_params, reads_memory
from model.registry import BLOCKS, did_you_mean
from model.schema import BlockNode, MirrorNode, Node, RepeatNode, UseNode, WrapNode


def block(b: Builder, node: BlockNode, dim: int, at: Place) -> list[Item]:
    if hasattr(BLOCKS.get(node.name), "bank_of"):
        return [_layer(b, node, dim, at)]
    if node.as_ is None:
        name = b.numbered(at, node.name)
    else:
        name = b.labels[node.as_] = node.as_
    params = reader_params(b, node, dim, at) if reads_memory(node.name) else node.params
    b.module(name, at.spec("block", node.name, dim, params, node.mark))
    return [Visit(b.site(at.site + name), name)]


def _layer(b: Builder, node: BlockNode, dim: int, at: Place) -> Visit:
    """One more layer of a bank, whose module grows with every visit."""
    cls: Any = BLOCKS.get(node.name)
    bank = node.params.get(cls.bank_of, BLOCKS.params(node.name)[cls.bank_of].default)
    name = bank if at.shell is None else f"{at.shell.name}_{bank}"
    if node.as_ is not None:
        b.errors.append(f"{node.mark}: `as: {node.as_}`: layers of the bank {bank!r} are told by their order")
    if "visits" in node.params:
        b.errors.append(f"{node.mark}: visits: is counted; drop it")
    visit = b.banks.get(name, 0)
    b.banks[name] = visit + 1
    spec = at.spec("block", node.name, dim, {**node.params, "visits": visit + 1}, node.mark)
    if visit == 0:
        b.module(name, spec)
        return Visit(b.site(at.site + name), name, visit)
    first = b.modules[name]
    same = {**first.params, "visits": 0} == {**spec.params, "visits": 0}
    if not same or (first.dim, first.frozen) != (dim, spec.frozen):
        b.errors.append(
            f"{node.mark}: the bank {bank!r} was made at {first.mark} with other parameters, another width or"
            " `frozen` otherwise; layers of one bank have the same, or give this one another `bank`"
        )
    b.modules[name] = replace(first, params=spec.params)
    return Visit(b.site(at.site + name), name, visit)


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
    if node.frozen:
        at = replace(at, frozen=True)
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
