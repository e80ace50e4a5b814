"""Questions about annotations, and small tools of the reader that know no reader."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal

from model.config.yamlnodes import Yaml
from model.registry import BLOCKS, Branches
from model.schema import BlockNode, Node, QuantSpec

FORMS: dict[str, type] = {
    fields(c)[0].name.rstrip("_"): c for c in typing.get_args(Node) if c is not BlockNode
}
WANT_NODE = f"want a block, or one of the forms {', '.join(FORMS)}"


def is_node(kind: Any) -> bool:
    return set(typing.get_args(kind)) == set(typing.get_args(Node))


def admits_null(kind: Any) -> bool:
    return kind in (Any, None, QuantSpec) or types.NoneType in typing.get_args(kind)


def is_nested(name: str, kind: Any) -> bool:
    """Whether a parameter of that name and type holds the parameters of another block."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return name in BLOCKS.names() and any((typing.get_origin(k) or k) in (dict, Mapping) for k in kinds)


def is_branches(kind: Any) -> bool:
    """Whether a parameter of that type holds a list of blocks."""
    return Branches in (kind, *typing.get_args(kind))


def called(kind: Any) -> str:
    """A type as messages call it."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(a) for a in typing.get_args(kind))
    base = typing.get_origin(kind) or kind
    if base in (dict, Mapping) or is_dataclass(base):
        return "a mapping"
    return "a list" if base in (list, tuple, Sequence) else getattr(base, "__name__", str(base))


def over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Plain mappings merged, `top` winning."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        out[key] = over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def flat(places: Iterable[tuple[str, Yaml]]) -> Iterator[tuple[str, Yaml]]:
    """Lists inside a list, one after another."""
    for path, node in places:
        if isinstance(node.value, list):
            yield from flat((f"{path}[{i}]", n) for i, n in enumerate(node.value))
        else:
            yield path, node


def leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from leaves(value)
    else:
        yield data


def peek(node: Yaml, key: str) -> int | None:
    """An integer under a key, before the mapping is read in earnest."""
    child = node.value.get(key) if isinstance(node.value, dict) else None
    value = 0 if child is None or isinstance(child.value, bool) else child.value
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and value > 0 else None


def default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
