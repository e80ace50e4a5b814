"""YAML as a tree that remembers where everything was written.

A `Yaml` node holds a scalar, a list of nodes or a mapping of nodes, and the `Mark` of its place. The
tree survives `extends` (`merge`) and `--set` (`assign`), so every later error can name file:line:column.

Scalars follow the YAML 1.2 core schema: `1e-3` is a float, `no` and `on` are strings. Duplicate keys,
custom tags and merge keys are errors. `write` is the inverse of `parse` on plain data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from model.schema import Mark

MAX_NODES = 20_000  # aliases of aliases can unfold a small file without end
Report = Callable[[Mark, str, str], None]  # (place, path, message)


@dataclass
class Yaml:
    """value: None, bool, int, float, str, list[Yaml] or dict[str, Yaml]. keys: where each key stands."""

    value: Any
    mark: Mark
    keys: dict[str, Mark] = field(default_factory=dict)

    def show(self) -> str:
        """The value as an error message calls it."""
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        if self.value is None or isinstance(self.value, bool):
            return {None: "null", True: "true", False: "false"}[self.value]
        text = repr(self.value)
        return text if len(text) <= 60 else text[:57] + "..."

    def plain(self) -> Any:
        """The same data without marks."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


# ----------------------------------------------------------------------------- reading

_SCALARS: list[tuple[str, str, str]] = [
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would not read back as a string."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's own line breaks survive in double quotes alone.
        style = '"' if any(c in data for c in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _kind, _regex, _first in _SCALARS:
    # An empty plain scalar is looked up under ''.
    _starts = [c if c != "\0" else "" for c in _first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_regex), _starts)


def parse(text: str, file: str, report: Report) -> Yaml | None:
    """The tree of one YAML document, or None after a syntax error (reported with its place).

    Duplicate keys, foreign tags and loops are reported too, and left out of the tree.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        mark = Mark(file, at.line + 1, at.column + 1) if at else Mark(file)
        parts = [p for p in (error.context, error.problem) if p]
        report(mark, "", "not YAML: " + ", ".join(parts))
        return None
    except yaml.YAMLError as error:
        report(Mark(file), "", "not YAML: " + " ".join(str(error).split()))
        return None
    except RecursionError:
        report(Mark(file), "", "nested too deeply")
        return None
    if root is None:
        return Yaml(None, Mark(file, 1, 1))
    return _Converter(file, report).node(root, "", ())


class _Converter:
    def __init__(self, file: str, report: Report) -> None:
        self.file, self.report, self.count = file, report, 0

    def mark(self, node: yaml.Node) -> Mark:
        return Mark(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def node(self, node: yaml.Node, path: str, above: tuple[yaml.Node, ...]) -> Yaml:
        mark = self.mark(node)
        self.count += 1
        if node in above or self.count > MAX_NODES:
            loop = "an alias contains itself" if node in above else f"unfolds to more than {MAX_NODES} nodes"
            if self.count <= MAX_NODES + 1:
                self.report(mark, path, loop)
            return Yaml(None, mark)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.ScalarNode):
            if kind not in ("str", "null", "bool", "int", "float"):
                self.report(mark, path, f"the tag {node.tag!r} is not allowed")
            return Yaml(_scalar(kind, node.value), mark)
        if kind not in ("seq", "map"):
            self.report(mark, path, f"the tag {node.tag!r} is not allowed")
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(n, f"{path}[{i}]", (*above, node)) for i, n in enumerate(node.value)]
            return Yaml(items, mark)
        return self.mapping(node, path, above)

    def mapping(self, node: yaml.Node, path: str, above: tuple[yaml.Node, ...]) -> Yaml:
        out = Yaml({}, self.mark(node))
        for key_node, value_node in node.value:
            key_mark = self.mark(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.report(key_mark, path, "a key must be a plain name")
                continue
            key = key_node.value
            value = self.node(value_node, join(path, key), (*above, node))
            if key in out.value:
                first = out.keys[key].line
                self.report(key_mark, path, f"key {key!r} given twice (first on line {first})")
                continue
            out.value[key], out.keys[key] = value, key_mark
        return out


def _scalar(kind: str, text: str) -> Any:
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:  # an integer of thousands of digits, or a forced tag that does not fit
        pass
    return text


def from_data(data: Any, mark: Mark, report: Report, path: str = "", depth: int = 0) -> Yaml:
    """The tree of plain Python data; every node carries the one mark."""
    if data is None or isinstance(data, bool | int | float | str):
        return Yaml(data, mark)
    if depth > 100:
        report(mark, path, "nested too deeply")
        return Yaml(None, mark)
    if isinstance(data, dict):
        items = {str(k): from_data(v, mark, report, join(path, str(k)), depth + 1) for k, v in data.items()}
        return Yaml(items, mark, dict.fromkeys(items, mark))
    if isinstance(data, list | tuple):
        return Yaml([from_data(v, mark, report, f"{path}[{i}]", depth + 1) for i, v in enumerate(data)], mark)
    report(mark, path, f"want plain data, got {type(data).__name__}")
    return Yaml(None, mark)


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def write(data: Any) -> str:
    """YAML text of plain data; `parse` gives the same data back."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )


# ----------------------------------------------------------------------------- layering


def merge(base: Yaml, over: Yaml) -> Yaml:
    """`over` on top of `base`: mappings are merged, everything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    out = dict(base.value)
    for key, node in over.value.items():
        out[key] = merge(out[key], node) if key in out else node
    return Yaml(out, over.mark, {**base.keys, **over.keys})


class WalkError(ValueError):
    """A path that leads nowhere: where it got to, and what was wanted there."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path, self.message = path, message


def assign(root: Yaml, path: list[str], value: Yaml) -> Yaml:
    """A copy of the tree with `value` at the path.

    Lists are walked by index, by the name of a block (which leads to its parameters), or by the `name`
    or `as` of an item. A bare name (`mlp`, `int8`) is opened into a mapping; missing mappings are made.
    Raises WalkError.
    """
    return _assign(root, path, value, ())


def _assign(node: Yaml, path: list[str], value: Yaml, done: tuple[str, ...]) -> Yaml:
    if not path:
        return value
    key, rest = path[0], path[1:]
    where = ".".join((*done, key))
    if isinstance(node.value, list):
        index, enter = _find(node.value, key, where)
        items = list(node.value)
        here = done if enter == key else (*done, key)
        items[index] = _assign(items[index], [enter, *rest] if enter else rest, value, here)
        return replace(node, value=items)
    if node.value is None or (isinstance(node.value, str) and node.value == key):
        node = Yaml({}, value.mark)  # `mlp` -> {mlp: ...}
    if not isinstance(node.value, dict):
        raise WalkError(where, f"nothing to set in {node.show()}")
    old = node.value.get(key, Yaml(None, value.mark))
    new = _assign(old, rest, value, (*done, key))
    return Yaml({**node.value, key: new}, node.mark, {**node.keys, key: value.mark})


def _find(items: list[Yaml], key: str, where: str) -> tuple[int, str | None]:
    """Index of the item that `key` means, and the key inside the item that it leads to, if any."""
    if key.isdecimal() and int(key) < len(items):
        return int(key), None
    names = [_names(item) for item in items]
    hits = [(i, enter) for i, known in enumerate(names) for name, enter in known.items() if name == key]
    if len(hits) == 1:
        return hits[0]
    flat = [name for known in names for name in known]
    unique = [name for name in dict.fromkeys(flat) if flat.count(name) == 1]
    want = f"want an index below {len(items)}" if items else "the list is empty"
    if unique:
        want += f" or one of {unique}, unique"
    raise WalkError(where, want + (f"; {key!r} is there {len(hits)} times" if hits else ""))


def _names(item: Yaml) -> dict[str, str | None]:
    """What an item of a list may be called, and the key that each name leads to (None: the item)."""
    if isinstance(item.value, str):
        return {item.value: item.value}
    if not isinstance(item.value, dict):
        return {}
    if "name" in item.value:  # a shell: its keys are fields, not names
        return {str(item.value["name"].value): None}
    names: dict[str, str | None] = {key: key for key in item.value if key != "as"}
    if names and "as" in item.value:
        names[str(item.value["as"].value)] = next(iter(names))
    return names
