"""Parameters of registered classes: blocks, quantizers, wraps.

They are checked against the signature of the class, over the file's `defaults: {name: {...}}`. Two kinds of
parameters hold other blocks, which take the defaults of their names and are checked as such:
  a dict that is called like a registered block (`mamba2` of `samba`) is that block's parameters;
  `registry.Branches` (`of` of `mix`) is a list of `name` or `{name: {...}}`.
Every block is then built once on the meta device, at the width where it stands, and its ValueError is
reported at the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from model.config.kinds import admits_null, is_branches, is_nested, over
from model.config.sources import Errors
from model.config.yamlnodes import Yaml, join
from model.registry import BLOCKS, Registry, did_you_mean
from model.schema import Mark

RESERVED = {"channels": "`to` of the shell", "width": "`width` of the wrap"}  # what the grammar sets
FAIL: Any = type("Fail", (), {"__repr__": lambda self: "FAIL"})()  # an error was reported; never a value


def _whole(values: dict[str, Any], node: Yaml) -> bool:
    """Whether everything in a mapping could be read."""
    return isinstance(node.value, dict) and len(values) == len(node.value)


class ParamReader(ABC):
    """Parameters from nodes; `value` reads what a type says.

    defaults: the file's, by registered name.  width: of the stream where the reader is, if known.
    """

    def __init__(self, errors: Errors) -> None:
        self.errors = errors
        self.defaults: dict[str, dict[str, Any]] = {}
        self.width: int | None = None

    @abstractmethod
    def value(self, kind: Any, node: Yaml, path: str) -> Any:
        """The node as a value of the annotated type."""

    def fail(self, node: Yaml | Mark, path: str, message: str) -> Any:
        self.errors.report(node.mark if isinstance(node, Yaml) else node, path, message)
        return FAIL

    def params(self, registry: Registry, name: str, node: Yaml, path: str) -> Any:
        """Typed parameters over the file's defaults, checked by the class itself."""
        given = self.typed(registry, name, node, path)
        if not _whole(given, node):
            return FAIL
        values = self.filled(registry, name, given)
        good = registry is not BLOCKS or self.valid(registry, name, values, node, path)
        return values if good else FAIL

    def typed(self, registry: Registry, name: str, node: Yaml, path: str) -> dict[str, Any]:
        """What was written, typed; what failed is reported and left out."""
        if not isinstance(node.value, dict):
            self.fail(node, path, f"want a mapping of parameters, got {node.show()}")
            return {}
        known = registry.params(name)
        open_ = {k: p for k, p in known.items() if registry is BLOCKS or k not in RESERVED}
        out: dict[str, Any] = {}
        for key, child in node.value.items():
            at = join(path, key)
            if key in known and key not in open_:
                self.fail(node.keys[key], path, f"{key!r} is set by {RESERVED[key]}")
            elif key not in known:
                self.fail(node.keys[key], path, f"unknown key {key!r}{did_you_mean(key, open_)}")
            elif child.value is None and not admits_null(known[key].type):
                out[key] = known[key].default
            elif child.value is not None and is_nested(key, known[key].type):
                inner = self.typed(BLOCKS, key, child, at)
                out[key] = inner if _whole(inner, child) else FAIL
            elif child.value is not None and is_branches(known[key].type):
                out[key] = self.branches(child, at)
            else:
                out[key] = self.value(known[key].type, child, at)
        return {key: value for key, value in out.items() if value is not FAIL}

    def named(self, node: Yaml) -> tuple[str, Yaml, Mark] | str:
        """`name` or `{name: params}`: the name, its parameters and its place; or what was given instead."""
        if isinstance(node.value, str):
            return node.value, Yaml({}, node.mark), node.mark
        if isinstance(node.value, dict) and len(node.value) == 1:
            name, params = next(iter(node.value.items()))
            return name, Yaml({}, params.mark) if params.value is None else params, node.keys[name]
        return f"the keys {list(node.value)}" if isinstance(node.value, dict) else node.show()

    def branches(self, node: Yaml, path: str) -> Any:
        """A list of blocks as `[{name: params}]`, without the file's defaults."""
        if not isinstance(node.value, list):
            return self.fail(node, path, f"want a list of blocks, got {node.show()}")
        out: list[Any] = []
        for i, child in enumerate(node.value):
            at, found = f"{path}[{i}]", self.named(child)
            if isinstance(found, str):
                out.append(self.fail(child, at, f"want one block, `name` or `name: {{...}}`, got {found}"))
                continue
            name, params, mark = found
            if name not in BLOCKS.names():
                hint = did_you_mean(name, BLOCKS.names())
                out.append(self.fail(mark, at, f"no block called {name!r}{hint}"))
                continue
            values = self.typed(BLOCKS, name, params, join(at, name))
            out.append({name: values} if _whole(values, params) else FAIL)
        return FAIL if FAIL in out else out

    def filled(
        self, registry: Registry, name: str, given: dict[str, Any], within: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The file's defaults with `given` on top, down into the blocks inside a composite."""
        out = over(self.defaults.get(name, {}), given)
        for key, param in registry.params(name).items():
            if is_branches(param.type) and out.get(key):
                pairs = [next(iter(entry.items())) for entry in out[key]]
                out[key] = [{n: self.filled(BLOCKS, n, given, (*within, name))} for n, given in pairs]
            if key in (*within, name) or not is_nested(key, param.type):
                continue
            if key in out and out[key] is None:
                continue
            inner = self.filled(BLOCKS, key, out.get(key, {}), (*within, name))
            if inner or key in out:
                out[key] = inner
        return out

    def valid(self, registry: Registry, name: str, values: dict[str, Any], node: Yaml, path: str) -> bool:
        """Whether the class, and first the blocks inside a composite, can be built at the width here."""
        if self.width is None:
            return True
        good = True
        for key, param in registry.params(name).items():
            if is_nested(key, param.type) and values.get(key):
                good = self.valid(BLOCKS, key, values[key], node, join(path, key)) and good
            written = node.value.get(key) if isinstance(node.value, dict) else None
            for i, entry in enumerate(values.get(key) or () if is_branches(param.type) else ()):
                at = node if written is None else written.value[i]
                for inner, given in entry.items():
                    good = self.valid(BLOCKS, inner, given, at, f"{join(path, key)}[{i}].{inner}") and good
        if not good:
            return False
        try:
            with torch.device("meta"):  # shapes without memory
                registry.get(name)(self.width, **values)
        except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "meta tensors" in message:  # it wants real numbers: building the model will tell
                return True
            self.fail(node, path, message)
            return False
        return True
