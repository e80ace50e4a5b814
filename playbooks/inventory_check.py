"""Check an inventory: `python playbooks/inventory_check.py inventory.yml`.

Prints every error with the place of the key and the remedy, and exits with 2; prints nothing and exits with 0
when all is well. Needs PyYAML, which ansible-core brings.
"""

from __future__ import annotations

import difflib
import ipaddress
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Rule = tuple[str, Callable[[Any], bool]]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _port(value: Any) -> bool:
    return _count(value) and 1024 <= value < 65536


def _absolute(value: Any) -> bool:
    return _text(value) and value.startswith("/")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(_text(v) for v in value)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _stages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


# Keys of the lab, and what they must be. Those of a host may stand at `all` or a group, too.
CLUSTER: dict[str, Rule] = {
    "lab_root": ("an absolute path", _absolute),
    "lab_user": ("a user name", _text),
    "lab_become": ("true or false", lambda v: isinstance(v, bool)),
    "lab_packages": ("a list of packages", _texts),
    "lab_wheelhouse": ("a folder of wheels on the controller", _text),
    "lab_port": ("a port, 1024 to 65535", _port),
    "lab_probe_port": ("a port, 1024 to 65535", _port),
    "lab_min_disk_gb": ("a number above 0", _positive),
    "lab_max_skew_s": ("seconds above 0", _positive),
    "lab_min_driver": ("a driver version, such as '550.0'", _text),
    "lab_data": ("a mapping", _mapping),
    "lab_run": ("a folder name", lambda v: _text(v) and "/" not in v),
    "lab_stages": ("a list of stages", _stages),
    "lab_outer": ("a mapping of outer.* keys", _mapping),
    "lab_deadline_s": ("seconds above 0", _positive),
    "lab_slurm": ("a mapping of #SBATCH options", _mapping),
    "lab_parameters": ("a number above 0", _positive),
    "lab_step_s": ("seconds above 0", _positive),
    "lab_secret": ("in a vault file (ansible-vault), not here", lambda v: isinstance(v, Vaulted)),
}
HOST: dict[str, Rule] = {
    "lab_ranks": ("a whole number from 1", _count),
    "lab_speed": ("a number above 0", _positive),
    "lab_nice": ("a niceness, 0 to 19", lambda v: v in range(20) and not isinstance(v, bool)),
    "lab_python": ("an absolute path of an interpreter", _absolute),
}
DATA = {"dir", "source", "tokenizer", "merges", "heldout", "include"}
STAGE = {"name", "arch", "set"}
ANSIBLE = (
    "host port user become_method ssh_private_key_file ssh_common_args "
    "ssh_extra_args python_interpreter remote_tmp"
)
ALLOWED = [*CLUSTER, *HOST, *(f"ansible_{word}" for word in ANSIBLE.split())]
NEEDED = ("lab_root", "lab_user", "lab_port", "lab_data", "lab_run", "lab_stages")


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


def unknown(where: str, key: object, allowed: list[str]) -> str:
    near = difflib.get_close_matches(str(key), allowed, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(allowed))}"
    return f"{where}: unknown key {key!r}; {hint}"


def _mapping_at(where: str, value: Any) -> tuple[dict[Any, Any], list[str]]:
    if value is None:
        return {}, []
    return (value, []) if isinstance(value, dict) else ({}, [f"{where}: want a mapping, not {value!r}"])


def variables(where: str, found: Any) -> Iterator[str]:
    """Errors in a mapping of variables."""
    found, errors = _mapping_at(where, found)
    yield from errors
    rules = CLUSTER | HOST
    for key, value in found.items():
        if key not in ALLOWED:
            yield unknown(where, key, ALLOWED)
        elif key in rules and not rules[key][1](value):
            shown = "the value given" if key == "lab_secret" else repr(value)
            yield f"{where}.{key}: want {rules[key][0]}, not {shown}"
    yield from nested(where, found)


def nested(where: str, found: dict[Any, Any]) -> Iterator[str]:
    data = found.get("lab_data")
    if isinstance(data, dict):
        yield from (unknown(f"{where}.lab_data", k, sorted(DATA)) for k in data if k not in DATA)
        yield from (f"{where}.lab_data.{k}: is missing" for k in ("dir", "source") if not data.get(k))
    stages = found.get("lab_stages")
    for i, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict):
            place = f"{where}.lab_stages[{i}]"
            yield from (unknown(place, k, sorted(STAGE)) for k in stage if k not in STAGE)
            yield from (f"{place}.{k}: is missing" for k in ("name", "arch") if not stage.get(k))
    names = [s.get("name") for s in stages or [] if isinstance(s, dict)] if isinstance(stages, list) else []
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
    return errors + addresses(hosts)


def addresses(hosts: dict[str, dict[str, Any]]) -> list[str]:
    """Every host has an address of its own, as a number: firewall rules are made of them."""
    errors, owner = [], {}
    for name, found in hosts.items():
        address = found.get("ansible_host")
        if not address:
            errors.append(f"{name}: ansible_host is missing")
            continue
        try:
            ipaddress.ip_address(str(address))
        except ValueError:
            errors.append(f"{name}.ansible_host: want an IP address, not {address!r}")
        if str(address) in owner:
            errors.append(f"{name}.ansible_host: {address} is also {owner[str(address)]}'s")
        owner[str(address)] = name
    return errors


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
