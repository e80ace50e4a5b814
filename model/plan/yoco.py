"""`yoco`: the self half, one memory, the cross half; and where a prefill may skip the cross half."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from model.items import Bracket, Cross, Item, ModuleSpec, Visit, walk
from model.plan.builder import Builder, Place
from model.registry import BLOCKS, make_block
from model.schema import BlockNode, Config, UseNode, YocoNode

NO_MEMORY = "it stands in no `cross` half of a yoco (a bracket in between hides the memory)"


def yoco(b: Builder, node: YocoNode, dim: int, at: Place) -> tuple[Item, ...]:
    """The self half, then the memory with the cross half inside (arXiv 2405.05254)."""
    spec = node.yoco
    own = b.nodes(spec.self_, dim, at)
    memory, mark = spec.memory, spec.memory.mark
    width, heads = memory.head_dim, dim // memory.head_dim
    if dim % width or heads % memory.group or (width % 2 and memory.position == "rope"):
        b.errors.append(
            f"{mark}: head_dim: {width}, group: {memory.group} at width {dim}: head_dim must divide the"
            " width (and be even for RoPE), and group the query heads"
        )
        return own
    params = {
        "head_dim": width,
        "heads": heads // memory.group,
        "position": memory.position,
        "theta": memory.theta,
        "ring": memory.ring,
        "keep": None if memory.keep is None else asdict(memory.keep),
    }
    name = b.numbered(at, "memory")
    b.module(name, at.spec("memory", "memory", dim, params, mark))
    site = b.site(at.site + name)
    inner = b.nodes(spec.cross, dim, replace(at, memory=memory))
    if not b.errors and not any(_reads(b, item) for item in walk(inner)):
        b.errors.append(f"{node.mark}: nothing in `cross` reads the memory; want an xattn or a recall there")
    b.skips[site] = node
    return (*own, Cross(site, name, inner))


def _reads(b: Builder, item: Item) -> bool:
    return isinstance(item, Visit) and bool(reads_memory(b.modules[item.module].name))


def check_use(b: Builder, node: UseNode, spec: ModuleSpec, at: Place) -> None:
    """Whether a block that is used again fits the memory that it meets here, if it reads one."""
    far = reads_memory(spec.name)
    if not far:
        return
    if at.memory is None:
        b.errors.append(f"{node.mark}: {node.use!r} reads a memory: {NO_MEMORY}")
        return
    for key, mine, theirs in (
        ("head_dim", spec.params["head_dim"], at.memory.head_dim),
        (far, spec.params[far], at.memory.ring),
    ):
        if theirs is not None and mine != theirs and (key != far or mine is None or mine > theirs):
            b.errors.append(f"{node.mark}: {node.use!r} has {key}: {mine}, but the memory here has {theirs}")


def reader_params(b: Builder, node: BlockNode, dim: int, at: Place) -> dict[str, Any]:
    """Parameters of a block that reads the memory: its head width is the memory's."""
    if at.memory is None:
        b.errors.append(f"{node.mark}: {node.name} reads a memory: {NO_MEMORY}")
        return node.params
    width, group = at.memory.head_dim, at.memory.group
    given, kv = node.params.get("head_dim") or width, dim // width // group
    heads = node.params.get("heads") or dim // width
    if given != width or heads % max(kv, 1):
        b.errors.append(
            f"{node.mark}: {node.name} has {heads} heads of width {given}, but the memory has {kv} of"
            f" width {width}: widths must be equal and the memory's heads divide the block's"
        )
    ring, far = at.memory.ring, reads_memory(node.name)
    reach = node.params.get(far)
    if ring is not None and reach is not None and reach > ring:
        b.errors.append(f"{node.mark}: {far}: {reach}, but the memory's ring holds {ring} tokens")
    params = {**node.params, "head_dim": width, far: ring if reach is None else reach}
    try:
        with torch.device("meta"):
            make_block(node.name, dim, **params)
    except ValueError as error:
        b.errors.append(f"{node.mark}: {error}")
    return params


def settle(b: Builder, items: tuple[Item, ...], config: Config) -> tuple[Item, ...]:
    """Decide where a prefill may skip the cross half: where nothing needs its other tokens."""
    out = list(items)
    for site, node in b.skips.items():
        i = next((i for i, item in enumerate(items) if item.site == site), None)
        why = None if b.errors else _why_not(b, items, i, config)
        if why is not None and node.yoco.skip == "on":
            b.errors.append(f"{node.mark}: skip: on, but {why}; use `skip: auto`")
        if i is not None and why is None and node.yoco.skip != "off":
            out[i] = replace(out[i], skip=True)  # type: ignore[arg-type]
    return tuple(out)


def _why_not(b: Builder, items: tuple[Item, ...], i: int | None, config: Config) -> str | None:
    """Why the cross half of item i has to see every token of a prompt, or None."""
    if i is None:
        return "this yoco stands inside another one or inside a bracket, which needs every token"
    if i + 1 < len(items):
        return "something follows this yoco and needs every token"
    for item in walk(items[i].inner):  # type: ignore[union-attr]
        spec = b.modules[item.module]
        if isinstance(item, Bracket | Cross) or (isinstance(item, Visit) and _keeps_state(spec)):
            return f"{spec.name} in its cross half ({spec.mark}) keeps a state, which needs every token"
    for name, head in config.heads.items():
        if head.keeps_state:
            return f"the head {name!r} keeps a state, which needs every token"
    return None


def reads_memory(name: str) -> str:
    """The parameter that limits how far back a block of that name reads the memory; "" if it reads none."""
    return getattr(BLOCKS.get(name), "reads_memory", "")


def _keeps_state(spec: ModuleSpec) -> bool:
    """Whether such a block has a state, tried on the meta device, which takes no memory."""
    with torch.device("meta"):
        block = make_block(spec.name, spec.dim, **spec.params)
        leaves = torch.utils._pytree.tree_leaves(block.init_state(1, torch.empty(())))
        return any(isinstance(leaf, torch.Tensor) for leaf in leaves)
