"""YAML to `Config` and back: `load`, `dump`, `dumps`, `digest`.

A configuration is read over YAML nodes into the dataclasses of `model.schema`, by their annotations. A
failed value is reported with file:line:column and path and reading goes on, so a file's errors come all
at once, in one ConfigError. Layers, from the bottom up: `extends` (mappings merge, lists replace), the
file, the overrides. `key: null` drops a key: it counts as not written, unless the key's type admits null.

    yamlnodes   YAML as a tree with marks; merging and assigning
    sources     where files are found, `extends`, overrides
    reader      nodes to dataclasses; params: parameters of registered classes
    checks      what a type cannot say
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from model.config import sources
from model.config.reader import FAIL, Reader
from model.config.yamlnodes import write
from model.schema import ARCH_KEYS, BlockNode, BySpec, Config, ConfigError, QuantSpec

__all__ = ["ConfigError", "arch_digest", "digest", "dump", "dumps", "load"]


def load(
    source: str | Path | Mapping[str, Any],
    sets: Iterable[str] | Mapping[str, Any] = (),
    search: Sequence[str | Path] = (),
) -> Config:
    """The resolved configuration.

    source: a path, an arch name (looked up in the working folder, then in `search`, then in
            model/archs/; with or without .yaml), or a mapping with a file's keys.
    sets:   `key.path=value` strings (values are YAML), or a mapping: plain keys merge like a file that
            extends the source, dotted keys assign like `--set`.
    Raises ConfigError with every error that was found.
    """
    errors = sources.Errors()
    root, name = sources.gather(source, sets, [Path(p) for p in search], errors)
    config = Reader(errors).config(root, name)
    if errors.lines or config is FAIL:
        raise ConfigError(errors.lines)
    return config


def dump(config: Config) -> dict[str, Any]:
    """The configuration as plain data, every key spelled out; `load` gives an equal Config back."""
    return _plain(config)


def dumps(config: Config) -> str:
    """The configuration as YAML text."""
    return write(dump(config))


def digest(config: Config) -> str:
    """Hash of everything in the configuration (32 hex digits)."""
    return _hash(dump(config))


def arch_digest(config: Config) -> str:
    """Hash of the architecture alone: what decides whether weights fit."""
    data = dump(config)
    return _hash({key: data[key] for key in ARCH_KEYS})


def _hash(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BlockNode):
        if not value.params and value.as_ is None:
            return value.name
        return {value.name: _plain(value.params)} | ({"as": value.as_} if value.as_ is not None else {})
    if isinstance(value, QuantSpec | BySpec):
        return {value.name: _plain(value.params)}
    if is_dataclass(value):
        kept = [f.name for f in fields(value) if not f.metadata.get("mark")]
        return {name.rstrip("_"): _plain(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
