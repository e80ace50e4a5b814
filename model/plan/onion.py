"""`onion`: nested shells, each between the halves of the quantizer of the one around it."""

from __future__ import annotations

from model.items import Bracket, Fade, Item
from model.plan.builder import Builder, Place
from model.schema import OnionNode


def onion(b: Builder, node: OnionNode, dim: int, at: Place) -> tuple[Item, ...]:
    if at.frozen:
        b.errors.append(
            f"{node.mark}: an onion inside a frozen `repeat`: its shells have `frozen` themselves"
        )
    names = [s.name for s in node.onion]
    for i, shell in enumerate(node.onion):
        if shell.name in names[:i]:
            b.errors.append(f"{shell.mark}: a second shell called {shell.name!r}; shell names are unique")
        size = shell.merging.size
        if size > 1 and not shell.residual:
            b.errors.append(
                f"{shell.mark}: merge: {size} without `residual: true`: only one position in"
                f" {size} would ever see its own token; outer codes must bypass a shorter shell"
            )
        if i == 0 and (size > 1 or shell.residual or shell.blend.steps or shell.width not in (None, dim)):
            b.errors.append(f"{shell.mark}: the outermost shell takes no merge, residual, blend or width")
        if node.reading == "whole" and (size > 1 or shell.width not in (None, dim)):
            b.errors.append(f"{shell.mark}: `reading: whole` keeps width and length; drop width and merge")
    if b.errors:
        return ()
    return _shell(b, node, 0, dim)


def _shell(b: Builder, node: OnionNode, i: int, dim: int) -> tuple[Item, ...]:
    """f_i, enter q_i, everything further in, exit q_i, f_i, at width `dim`."""
    shell = node.onion[i]
    place = Place(f"{shell.name}.in.", f"{shell.name}_", shell)
    going_in = b.nodes(shell.body, dim, place)
    if shell.tie:
        going_out = b.again(going_in, (f"{shell.name}.in.", f"{shell.name}.out."))
    else:
        going_out = b.nodes(shell.body, dim, Place(f"{shell.name}.out.", f"{shell.name}_out_", shell))
    quant = b.module(
        f"{shell.name}_quant",
        place.spec(
            "quant",
            shell.quant.name,
            dim,
            {**shell.quant.params, "channels": shell.to},
            shell.quant.mark if shell.quant.mark.line else shell.mark,
        ),
    )
    inner = _inside(b, node, i, dim, quant) if i + 1 < len(node.onion) else ()
    return (*going_in, Bracket(b.site(f"{shell.name}.quant"), quant, inner), *going_out)


def _inside(b: Builder, node: OnionNode, i: int, dim: int, quant: str) -> tuple[Item, ...]:
    """What stands between the halves of quantizer i: the next shell, faded in."""
    outer, shell = node.onion[i], node.onion[i + 1]
    place = Place(shell=shell)
    innermost = i + 2 == len(node.onion)  # only the newest shell is faded in; the others are there
    if node.reading == "whole":
        inner = _shell(b, node, i + 1, dim)
        bracket = Bracket(b.site(f"{outer.name}.requant"), quant, inner, turned=True)
    else:
        width = shell.width or dim
        adapter = b.module(
            f"{shell.name}_adapter",
            place.spec(
                "adapter",
                "adapter",
                outer.to,
                {"width": width, "merge": shell.merging.size, "pool": shell.merging.pool},
                shell.mark,
            ),
        )
        inner = _shell(b, node, i + 1, width)
        bracket = Bracket(b.site(f"{shell.name}.adapter"), adapter, inner)
    blend = shell.blend
    params = {"steps": blend.steps if innermost else 0, "hold": blend.hold, "code": blend.code}
    fade = b.module(f"{shell.name}_fade", place.spec("fade", "fade", outer.to, params, shell.mark))
    return (Fade(b.site(f"{shell.name}.fade"), fade, (bracket,), shell.residual),)
