"""Check an inventory: `python playbooks/inventory_check.py inventory.yml`.

Prints every error with the place of the key and the remedy, and exits with 2; prints nothing and exits with 0
when all is well. Needs PyYAML, which ansible-core brings.
"""

from __future__ import annotations

import ast
import difflib
import ipaddress
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

Rule = tuple[str, Callable[[Any], bool]]
ROOT = Path(__file__).resolve().parents[1]
ARCHS = ROOT / "model" / "archs"


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: _number(value) and isinstance(value, int) and least <= value <= most


def _absolute(value: Any) -> bool:
    return _text(value) and value.startswith("/")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(_text(v) for v in value)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is not None


def _interface(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", value) is not None


def _below(value: Any) -> bool:
    """A path that stays below the folder it is joined to; `shard` clears it on workers with other data."""
    return isinstance(value, str) and all(_name(part) for part in value.split("/"))


def _arch(value: Any) -> bool:
    """As `pretrain.py --arch` finds it, whose working folder is the repository's root."""
    if not _text(value) or value.startswith("/") or ".." in value.split("/"):
        return False
    return any((folder / (value + end)).is_file() for folder in (ROOT, ARCHS) for end in ("", ".yaml"))


def _stages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


NAME = "a name (letters, digits, . _ -, the first a letter or digit)"
# Keys of the lab, and what they must be. Those of a host may stand at `all` or a group, too.
CLUSTER: dict[str, Rule] = {
    "lab_root": ("an absolute path", _absolute),
    "lab_user": ("a user name", _text),
    "lab_become": ("true or false", lambda v: isinstance(v, bool)),
    "lab_packages": ("a list of packages", _texts),
    "lab_wheelhouse": ("a folder of wheels on the controller", _text),
    "lab_port": ("a port, 1024 to 65535", _whole(1024, 65535)),
    "lab_probe_port": ("a port, 1024 to 65535", _whole(1024, 65535)),
    "lab_min_disk_gb": ("a number above 0", _positive),
    "lab_max_skew_s": ("seconds above 0", _positive),
    "lab_min_driver": ("a driver version, such as '550.0'", _text),
    "lab_data": ("a mapping", _mapping),
    "lab_run": (NAME, _name),
    "lab_stages": ("a list of stages", _stages),
    "lab_outer": ("a mapping of outer.* keys", _mapping),
    "lab_deadline_s": ("seconds above 0", _positive),
    "lab_slurm": ("a mapping of #SBATCH options", _mapping),
    "lab_parameters": ("a number above 0", _positive),
    "lab_step_s": ("seconds above 0", _positive),
    "lab_secret": ("in a vault file (ansible-vault), not here", lambda v: isinstance(v, Vaulted)),
}
HOST: dict[str, Rule] = {
    "lab_interface": ("the name of a network interface, such as enp5s0", _interface),
    "lab_ranks": ("a whole number from 1", _whole(1)),
    "lab_speed": ("a number above 0", _positive),
    "lab_nice": ("a niceness, 0 to 19", _whole(0, 19)),
    "lab_python": ("an absolute path of an interpreter", _absolute),
}
# As `dataset prepare` takes them, whose command line they become: several sources or patterns are one text.
DATA: dict[str, Rule] = {
    "dir": ("a folder below lab_root, such as data/corpus", _below),
    "source": ("text: a source, or several with blanks between", _text),
    "tokenizer": ("the name or path of a tokenizer", _text),
    "merges": ("a whole number from 0", _whole(0)),
    "heldout": ("a share, from 0 to below 1", lambda v: _number(v) and 0 <= v < 1),
    "include": ("text: a pattern, or several with blanks between, such as '*.py *.md'", _text),
}
STAGE: dict[str, Rule] = {
    "name": (NAME, _name),
    "arch": ("a file in model/archs/, or a path from the repository's root", _arch),
    "set": ("a mapping of keys of the configuration", _mapping),
}
ANSIBLE = (
    "host port user become_method ssh_private_key_file ssh_common_args "
    "ssh_extra_args python_interpreter remote_tmp"
)
VARIABLES = CLUSTER | HOST | {f"ansible_{word}": ("", lambda v: True) for word in ANSIBLE.split()}
NEEDED = ("lab_root", "lab_user", "lab_port", "lab_data", "lab_run", "lab_stages")
NEEDED_HOST = ("ansible_host", "lab_interface")


class Vaulted(str):
    """An encrypted value (`!vault`)."""


class Loader(yaml.SafeLoader):
    """Safe YAML that knows !vault and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_constructor("!vault", lambda loader, node: Vaulted(node.value))


def unknown(where: str, key: object, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), allowed := sorted(allowed), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
    return f"{where}: unknown key {key!r}; {hint}"


def ruled(
    where: str, found: dict[Any, Any], rules: dict[str, Rule], needed: tuple[str, ...] = ()
) -> Iterator[str]:
    """Errors in the keys of a mapping, and in their values."""
    for key, value in found.items():
        if key not in rules:
            yield unknown(where, key, rules)
        elif not rules[key][1](value):
            shown = "the value given" if key == "lab_secret" else repr(value)
            yield f"{where}.{key}: want {rules[key][0]}, not {shown}"
    yield from (f"{where}.{k}: is missing" for k in needed if k not in found)


def schema() -> dict[str, dict[str, str]]:
    """Keys of the classes of a configuration file, each with its type: another such class, or anything else.

    They are read off the source, because importing it takes torch, and the controller may have none. Names
    alone: whether values are right, and blocks, a node says before `launch` starts anything (tasks/stage.yml).
    """
    return {
        cls.name: {
            f.target.id.rstrip("_"): ast.unparse(f.annotation).removesuffix(" | None")
            for f in cls.body
            if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
        }
        for file in ("schema.py", "sections.py")
        for cls in ast.parse((ROOT / "model" / file).read_text()).body
        if isinstance(cls, ast.ClassDef)
    }


SCHEMA = schema()


def misspelt(where: str, kind: str, found: Any) -> Iterator[str]:
    """Unknown keys of a mapping that says a `kind` of SCHEMA. Keys may be dotted: `run.steps`."""
    if kind not in SCHEMA or not isinstance(found, dict):
        return
    for key, value in found.items():
        first, _, rest = str(key).partition(".")
        if first not in SCHEMA[kind]:
            yield unknown(where, first, SCHEMA[kind])
        else:
            inner = {rest: value} if rest else value
            yield from misspelt(f"{where}.{first}", SCHEMA[kind][first], inner)


def _mapping_at(where: str, value: Any) -> tuple[dict[Any, Any], list[str]]:
    if value is None:
        return {}, []
    return (value, []) if isinstance(value, dict) else ({}, [f"{where}: want a mapping, not {value!r}"])


def variables(where: str, found: Any) -> Iterator[str]:
    """Errors in a mapping of variables."""
    found, errors = _mapping_at(where, found)
    yield from errors
    yield from ruled(where, found, VARIABLES)
    yield from nested(where, found)


def nested(where: str, found: dict[Any, Any]) -> Iterator[str]:
    """Errors in the mappings inside of variables."""
    data, stages = found.get("lab_data"), found.get("lab_stages")
    if isinstance(data, dict):
        yield from ruled(f"{where}.lab_data", data, DATA, ("dir", "source"))
    yield from misspelt(f"{where}.lab_outer", "OuterConfig", found.get("lab_outer"))
    stages = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    for i, stage in enumerate(stages):
        place = f"{where}.lab_stages[{i}]"
        yield from ruled(place, stage, STAGE, ("name", "arch"))
        yield from misspelt(f"{place}.set", "Config", stage.get("set"))
    names = [str(s.get("name")) for s in stages]
    yield from (f"{where}.lab_stages: two are called {n!r}" for n in {n for n in names if names.count(n) > 1})


def check(inventory: Any) -> list[str]:
    """All errors of a parsed inventory."""
    if (
        not isinstance(inventory, dict)
        or list(inventory) != ["all"]
        or not isinstance(inventory["all"], dict)
    ):
        return ["want one mapping, 'all', with 'vars' and 'children'"]
    top = inventory["all"]
    errors = [unknown("all", k, ["vars", "children"]) for k in top if k not in ("vars", "children")]
    errors += variables("all.vars", top.get("vars"))
    common = top.get("vars") if isinstance(top.get("vars"), dict) else {}
    errors += [f"all.vars.{k}: is missing" for k in NEEDED if k not in common]
    groups, bad = _mapping_at("all.children", top.get("children"))
    errors += bad + [
        unknown("all.children", g, ["server", "workers"]) for g in groups if g not in ("server", "workers")
    ]
    hosts: dict[str, dict[str, Any]] = {}
    for group in ("server", "workers"):
        body, bad = _mapping_at(f"all.children.{group}", groups.get(group))
        errors += bad + [
            unknown(f"all.children.{group}", k, ["hosts", "vars"]) for k in body if k not in ("hosts", "vars")
        ]
        errors += variables(f"all.children.{group}.vars", body.get("vars"))
        members, bad = _mapping_at(f"all.children.{group}.hosts", body.get("hosts"))
        errors += bad
        for name, own in members.items():
            errors += variables(f"{group}.{name}", own)
            inherited = {**common, **(body.get("vars") or {})}
            hosts[name] = {**inherited, **hosts.get(name, {}), **(own if isinstance(own, dict) else {})}
        if group == "server" and len(members) != 1:
            errors.append(f"all.children.server.hosts: want one host, not {len(members)}")
        if group == "workers" and not members:
            errors.append("all.children.workers.hosts: want at least one host")
    return errors + addresses(hosts) + ports(hosts)


def addresses(hosts: dict[str, dict[str, Any]]) -> list[str]:
    """Every host has an address of its own, as a number: firewall rules are made of them.

    IPv4 alone: the probe and those rules know no other.
    """
    errors, owner = [], {}
    for name, found in hosts.items():
        errors += [f"{name}: {k} is missing" for k in NEEDED_HOST if not found.get(k)]
        address = found.get("ansible_host")
        if not address:
            continue
        try:
            ipaddress.IPv4Address(str(address))
        except ValueError:
            errors.append(f"{name}.ansible_host: want an IPv4 address, not {address!r}")
        if str(address) in owner:
            errors.append(f"{name}.ansible_host: {address} is also {owner[str(address)]}'s")
        owner[str(address)] = name
    return errors


def ports(hosts: dict[str, dict[str, Any]]) -> list[str]:
    """The probe's port is not the server's; where it is not given it is the next one."""
    errors = []
    for found in hosts.values():
        port, probe = found.get("lab_port"), found.get("lab_probe_port")
        if port is not None and probe == port:
            errors.append(f"lab_probe_port: {probe!r} is lab_port, too; want another")
        if port == 65535 and probe is None:
            errors.append("lab_probe_port: is missing, and after lab_port, 65535, there is none")
    return list(dict.fromkeys(errors))  # most often all hosts have the same


def main(argv: list[str]) -> int:
    if not argv:
        print("usage: inventory_check.py INVENTORY.yml", file=sys.stderr)
        return 2
    errors = []
    for path in argv:
        if not Path(path).is_file():
            errors.append(f"{path}: want one YAML file as the inventory")
            continue
        try:
            found = yaml.load(Path(path).read_text(), Loader)  # a SafeLoader
        except yaml.YAMLError as error:
            errors.append(f"{path}: {error}")
            continue
        errors += [f"{path}: {error}" for error in check(found)]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
