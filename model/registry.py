"""Names for blocks and quantizers: `@block("mamba2")`, `@quantizer("fsq")`, with did-you-mean.

A registered class is built from `dim` and keyword parameters. Its signature is its schema: the config
reader takes names, types and defaults from it, so nothing is said twice.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


class Branches(list[dict[str, dict[str, Any]]]):
    """The type of a parameter that holds blocks: `[{"mamba2": {"state": 64}}, {"swa": {}}]`."""


@dataclass(frozen=True)
class Param:
    """One keyword parameter of a registered class: its annotation and its default."""

    name: str
    type: Any
    default: Any


class Registry:
    """A table of classes by name; `kind` is what error messages call an entry."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        def add(cls: C) -> C:
            old = self._classes.get(name)
            if old is not None and old.__qualname__ != cls.__qualname__:
                raise ValueError(f"two classes want to be the {self.kind} {name!r}: {old} and {cls}")
            self._classes[name] = cls
            cls.registered_name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type:
        """The class of that name. Raises KeyError with a suggestion."""
        self._load()
        if name not in self._classes:
            raise KeyError(f"no {self.kind} called {name!r}{did_you_mean(name, self._classes)}")
        return self._classes[name]

    def params(self, name: str) -> dict[str, Param]:
        """Keyword parameters of the class of that name, in order, without `dim`."""
        return signature_params(self.get(name))

    def _load(self) -> None:
        """Import every module of the package once, so that its classes register themselves."""
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{info.name}")


@functools.cache
def signature_params(cls: type) -> dict[str, Param]:
    """Keyword parameters of a class's `__init__` with resolved annotations, without self and dim."""
    init = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(init)
    out: dict[str, Param] = {}
    for p in list(inspect.signature(init).parameters.values())[1:]:
        if p.name == "dim":
            continue
        if p.default is inspect.Parameter.empty:
            raise TypeError(
                f"{cls.__name__}: parameter {p.name!r} has no default; a block builds from dim alone"
            )
        out[p.name] = Param(p.name, hints.get(p.name, Any), p.default)
    return out


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of what there is when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


BLOCKS = Registry("block", "model.blocks")
QUANTIZERS = Registry("quantizer", "model.quant")
WRAPS = Registry("wrap", "model.wraps")
block = BLOCKS.register
quantizer = QUANTIZERS.register
wrap = WRAPS.register


def make_block(name: str, dim: int, **params: Any) -> Any:
    """Build a registered block: `make_block("mamba2", dim=256, state=64)`."""
    return _make(BLOCKS, name, dim, params)


def make_quantizer(name: str, dim: int, **params: Any) -> Any:
    """Build a registered quantizer."""
    return _make(QUANTIZERS, name, dim, params)


def make_wrap(name: str, dim: int, **params: Any) -> Any:
    """Build a registered wrap."""
    return _make(WRAPS, name, dim, params)


def _make(registry: Registry, name: str, dim: int, params: dict[str, Any]) -> Any:
    known = registry.params(name)
    for key in params:
        if key not in known:
            raise TypeError(f"{name}: unknown parameter {key!r}{did_you_mean(key, known)}")
    return registry.get(name)(dim, **params)
