"""Nodes to dataclasses, by their annotations.

Grammar. Every member of the union `schema.Node` but BlockNode is a form, known by its first field's name
(`repeat`, `use`, `onion`): a new form is one dataclass there. Lists inside lists are flattened.

Parameters of blocks, quantizers and wraps are read by `model.config.params`. A dataclass field with
`metadata={"block": name}` holds parameters of that block.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, Literal

from model.config.checks import check
from model.config.kinds import (
    FORMS,
    WANT_NODE,
    admits_null,
    called,
    default,
    flat,
    is_node,
    leaves,
    peek,
)
from model.config.params import FAIL, ParamReader
from model.config.sources import Errors
from model.config.yamlnodes import Yaml, join
from model.registry import BLOCKS, QUANTIZERS, WRAPS, Registry, did_you_mean
from model.schema import BlockNode, BySpec, Config, Mark, QuantSpec, ShellNode, UseNode, WrapSpec

CHOICES: dict[type, Registry] = {QuantSpec: QUANTIZERS, BySpec: WRAPS}  # `name` or `{name: params}`


class Reader(ParamReader):
    """Values from nodes. Every method returns the value, or FAIL after reporting why."""

    def __init__(self, errors: Errors) -> None:
        super().__init__(errors)
        self.labels: dict[str, Mark] = {}
        self.uses: list[UseNode] = []

    def config(self, root: Yaml, name: str) -> Any:
        """The whole file. Defaults are read first, because every block builds on them."""
        if not isinstance(root.value, dict):
            return self.fail(root, "", f"want a mapping with the keys `dim` and `stack`, got {root.show()}")
        root = replace(root, value={"name": Yaml(name, root.mark), **root.value})
        self._defaults(root.value.get("defaults"))
        self.width = peek(root, "dim")
        config = self.object(Config, root, "")
        for use in self.uses:
            if use.use not in self.labels:
                hint = did_you_mean(use.use, self.labels) or "; nothing has `as:`"
                self.fail(use.mark, use.mark.path, f"no block was named {use.use!r}{hint}")
        return config if config is FAIL else replace(config, defaults=self.defaults)

    def _defaults(self, node: Yaml | None) -> None:
        if node is None or not isinstance(node.value, dict):
            return
        for name, params in node.value.items():
            registry = next((r for r in (BLOCKS, QUANTIZERS, WRAPS) if name in r.names()), None)
            path = f"defaults.{name}"
            if registry is None:
                known = BLOCKS.names() + QUANTIZERS.names() + WRAPS.names()
                self.fail(node.keys[name], path, f"no block called {name!r}{did_you_mean(name, known)}")
            elif params.value is not None:
                self.defaults[name] = self.typed(registry, name, params, path)

    # -- types

    def value(self, kind: Any, node: Yaml, path: str) -> Any:
        """The node as a value of the annotated type."""
        if is_node(kind):
            return self.node(node, path)
        if kind in CHOICES:
            return self.choice(kind, node, path)
        if isinstance(kind, type) and is_dataclass(kind):
            return self.object(kind, node, path)
        if kind is Any:
            return self._finite(node, path)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, node, path)
        if origin is Literal:
            if any(node.value == a and type(node.value) is type(a) for a in args):
                return node.value
            words = ", ".join(repr(a) for a in args)
            hint = did_you_mean(node.value, [a for a in args if isinstance(a, str)])
            hint = hint if hint.startswith("; did") else ""
            return self.fail(node, path, f"want one of {words}, got {node.show()}{hint}")
        base = origin or kind
        if base in (dict, Mapping):
            return self._dict(args[1] if args else Any, node, path)
        if base in (list, Sequence, tuple):
            return self._list(base, args, node, path)
        return self._scalar(kind, node, path)

    def _scalar(self, kind: Any, node: Yaml, path: str) -> Any:
        value = node.value
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)  # 1e9 tokens
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1000 else math.inf
        if type(value) is not kind:
            name = getattr(kind, "__name__", str(kind))
            return self.fail(node, path, f"want {name}, got {node.show()}")
        return self._finite(replace(node, value=value), path)

    def _finite(self, node: Yaml, path: str) -> Any:
        value = node.plain()
        if any(isinstance(v, float) and not math.isfinite(v) for v in leaves(value)):
            return self.fail(node, path, "want a finite number")
        return value

    def _union(self, kinds: tuple[Any, ...], node: Yaml, path: str) -> Any:
        if node.value is None and types.NoneType in kinds:
            return None
        kinds = tuple(k for k in kinds if k is not types.NoneType)
        if len(kinds) == 1:
            return self.value(kinds[0], node, path)
        shape = type(node.value)
        exact = [k for k in kinds if shape is (dict if is_dataclass(k) else typing.get_origin(k) or k)]
        tried: list[Errors] = []
        for kind in exact + [k for k in kinds if k not in exact]:
            trial = Reader(Errors())
            value = trial.value(kind, node, path)
            if value is not FAIL:
                return value
            tried.append(trial.errors)
        if exact:
            self.errors.found.extend(tried[0].found)
            return FAIL
        wants = " or ".join(called(k) for k in kinds)
        return self.fail(node, path, f"want {wants}, got {node.show()}")

    def _dict(self, kind: Any, node: Yaml, path: str) -> Any:
        if not isinstance(node.value, dict):
            return self.fail(node, path, f"want a mapping, got {node.show()}")
        out = {}
        for key, child in node.value.items():
            if child.value is None and not admits_null(kind):
                continue
            out[key] = self.value(kind, child, join(path, key))
        return FAIL if FAIL in out.values() else out

    def _list(self, base: Any, args: tuple[Any, ...], node: Yaml, path: str) -> Any:
        if not isinstance(node.value, list):
            return self.fail(node, path, f"want a list, got {node.show()}")
        places = [(f"{path}[{i}]", n) for i, n in enumerate(node.value)]
        fixed = base is tuple and args and args[-1] is not Ellipsis
        if fixed and len(places) != len(args):
            return self.fail(node, path, f"want {len(args)} values, got {len(places)}")
        if not fixed and args and is_node(args[0]):
            places = list(flat(places))
        kinds = args if fixed else [args[0] if args else Any] * len(places)
        out = [self.value(kind, child, at) for kind, (at, child) in zip(kinds, places)]
        return FAIL if FAIL in out else base(out) if base is tuple else out

    # -- dataclasses

    def object(self, cls: type, node: Yaml, path: str) -> Any:
        """A dataclass from a mapping: unknown and missing keys, types, then the class's own checks."""
        if not isinstance(node.value, dict):
            return self.fail(node, path, f"want a mapping, got {node.show()}")
        known = {f.name.rstrip("_"): f for f in fields(cls) if not f.metadata.get("mark")}
        unknown = [key for key in node.value if key not in known]
        for key in unknown:
            self.fail(node.keys[key], path, f"unknown key {key!r}{did_you_mean(key, known)}")
        outside = self.width
        if cls in (ShellNode, WrapSpec):
            self.width = peek(node, "width") or self.width
        values = self._fields(cls, known, node, path)
        if cls is not ShellNode:  # a shell without a width has that of the shell before it
            self.width = outside
        wrong = list(check(cls, {k: v for k, v in values.items() if v is not FAIL}))
        for where, message in wrong:
            self._complain(where, message, node, path)
        if unknown or wrong or FAIL in values.values() or len(values) < len(known):
            return FAIL
        marks = {f.name: replace(node.mark, path=path) for f in fields(cls) if f.metadata.get("mark")}
        out = cls(**{known[key].name: value for key, value in values.items()}, **marks)
        if isinstance(out, UseNode):
            self.uses.append(out)
        if isinstance(out, ShellNode):
            params = {**out.quant.params, "channels": out.to}
            at = node.value.get("quant", node)
            if not self.valid(QUANTIZERS, out.quant.name, params, at, out.quant.mark.path):
                return FAIL
        if isinstance(out, WrapSpec):
            params = {**out.by.params, "width": out.width}
            if not self.valid(WRAPS, out.by.name, params, node.value["by"], out.by.mark.path):
                return FAIL
        return out

    def _fields(self, cls: type, known: dict[str, Field], node: Yaml, path: str) -> dict[str, Any]:
        """The values by YAML key, with defaults; a missing key is reported and left out."""
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, field in known.items():
            child, kind, at = node.value.get(key), hints[field.name], join(path, key)
            block = field.metadata.get("block")
            if child is not None and (child.value is not None or admits_null(kind)):
                if block is not None and child.value is not None:
                    values[key] = self.params(BLOCKS, block, child, at)
                else:
                    values[key] = self.value(kind, child, at)
            elif field.default is MISSING and field.default_factory is MISSING:
                self.fail(node, path, f"missing key {key!r}")
            elif kind is QuantSpec:  # its defaults may be the file's
                values[key] = self.value(kind, Yaml(default(field).name, node.mark), at)
            else:
                values[key] = default(field)
        return values

    def _complain(self, where: str | Mark, message: str, node: Yaml, path: str) -> None:
        """An error of `checks`, at its key if that was written, or else at the mapping."""
        if isinstance(where, Mark):
            self.fail(where, where.path, message)
            return
        at = node
        for key in where.split("."):
            at = at.value.get(key, at) if isinstance(at.value, dict) else at
        self.fail(at, join(path, where), message)

    # -- grammar

    def node(self, node: Yaml, path: str) -> Any:
        """One item of a stack: a block by name, a block with parameters, or a form."""
        if isinstance(node.value, str):
            return self._block(node.value, node, Yaml({}, node.mark), None, path)
        if not isinstance(node.value, dict):
            return self.fail(node, path, f"{WANT_NODE}, got {node.show()}")
        form = next((key for key in node.value if key in FORMS), None)
        if form is not None:
            return self.object(FORMS[form], node, path)
        names = [key for key in node.value if key != "as"]
        known = [key for key in names if key in BLOCKS.names()]
        if not names:
            return self.fail(node, path, f"{WANT_NODE}, got {node.show()}")
        if len(names) > 1 and known:
            rest = next(key for key in names if key != known[0])
            return self.fail(
                node.keys[rest],
                path,
                f"{rest!r} stands beside the block {known[0]!r}: indent its parameters further, and"
                " give every block an item of its own",
            )
        name = names[0]
        params, label = node.value[name], node.value.get("as")
        if params.value is None:
            params = Yaml({}, params.mark)
        return self._block(name, node, params, label, path)

    def _block(self, name: str, node: Yaml, params: Yaml, label: Yaml | None, path: str) -> Any:
        as_ = None
        if label is not None and label.value is not None:
            as_ = self.value(str, label, join(path, "as"))
            if as_ is not FAIL:
                self.labels[as_] = node.mark
        at = node.keys.get(name, node.mark)
        if name not in BLOCKS.names():
            return self.fail(
                at, path, f"no block called {name!r}{did_you_mean(name, [*BLOCKS.names(), *FORMS])}"
            )
        path = join(path, name)
        values = self.params(BLOCKS, name, params, path)
        if values is FAIL or as_ is FAIL:
            return FAIL
        return BlockNode(name, values, as_, replace(at, path=path))

    def choice(self, kind: type, node: Yaml, path: str) -> Any:
        """`int8`, `{fsq: {levels: 8}}`, or null, which is the quantizer `none`."""
        registry = CHOICES[kind]
        if node.value is None and kind is QuantSpec:
            node = Yaml("none", node.mark)
        found = self.named(node)
        if isinstance(found, str):
            want = f"want one {registry.kind}, `name` or `name: {{...}}`"
            return self.fail(node, path, f"{want}, got {found}")
        name, params, at = found
        if name not in registry.names():
            hint = did_you_mean(name, registry.names())
            return self.fail(at, path, f"no {registry.kind} called {name!r}{hint}")
        path = join(path, name)
        values = self.params(registry, name, params, path)
        return FAIL if values is FAIL else kind(name, values, replace(at, path=path))
