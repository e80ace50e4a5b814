"""The inventory checker: every mistake is named with its place and remedy, before a play begins."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.test_playbooks import BOOKS, load

check = load(BOOKS / "inventory_check.py")


def example() -> Any:
    return yaml.safe_load((BOOKS / "inventory.example.yml").read_text())


def test_example_inventory_is_right() -> None:
    assert check.check(example()) == []


def put(*path: Any) -> Any:
    """A change: the last of path is set at the place that the others lead to."""

    def change(inventory: Any) -> None:
        at = inventory
        for key in path[:-2]:
            at = at[key]
        if path[-1] is None:
            del at[path[-2]]
        else:
            at[path[-2]] = path[-1]

    return change


VARS = ("all", "vars")
SMALL = (*VARS, "lab_stages", 0)
BOX = ("all", "children", "workers", "hosts", "box2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(*VARS, "lab_portt", 29500), "unknown key 'lab_portt'; did you mean 'lab_port'?"),
        (put(*BOX, "lab_rank", 2), "workers.box2: unknown key 'lab_rank'; did you mean 'lab_ranks'?"),
        (put(*BOX, "lab_nice", 20), "lab_nice: want a niceness, 0 to 19, not 20"),
        (put(*BOX, "lab_ranks", 0), "lab_ranks: want a whole number from 1, not 0"),
        (put(*BOX, "ansible_host", "box2.local"), "box2.ansible_host: want an IPv4 address"),
        (put(*BOX, "ansible_host", "192.168.1.11"), "is also box1's"),
        (put(*BOX, "ansible_host", None), "box2: ansible_host is missing"),
        (put(*BOX, "lab_interface", None), "box2: lab_interface is missing"),
        (put(*BOX, "lab_interface", "eth 0"), "lab_interface: want the name of a network interface"),
        (put(*VARS, "lab_root", None), "all.vars.lab_root: is missing"),
        (put("all", "children", "server", "hosts", {}), "want one host, not 0"),
        (put("all", "children", "worker", {}), "did you mean 'workers'?"),
        (put(*SMALL, "archs", "x"), "lab_stages[0]: unknown key 'archs'"),
        (put(*VARS, "lab_stages", 1, "name", "small"), "two are called 'small'"),
        (put(*VARS, "lab_data", "tokeniser", "x"), "did you mean 'tokenizer'?"),
        (put(*VARS, "lab_data", "include", ["*.py", "*.md"]), "include: want text: a pattern, or several"),
        (put(*VARS, "lab_data", "merges", -1), "merges: want a whole number from 0, not -1"),
        (put(*VARS, "lab_data", "dir", "data/../.."), "dir: want a folder below lab_root"),
        (put(*VARS, "lab_outer", "evry", 9), "lab_outer: unknown key 'evry'; did you mean 'every'?"),
        (put(*SMALL, "set", "run.stepz", 9), "set.run: unknown key 'stepz'; did you mean 'steps'?"),
        (put(*SMALL, "set", "dmi", 9), "set: unknown key 'dmi'; did you mean 'dim'?"),
        (put(*SMALL, "set", "optim", {"mup": {"bas": 9}}), "set.optim.mup: unknown key 'bas'; did you mean"),
        (put(*SMALL, "arch", "nosuch.yaml"), "arch: want a file in model/archs/, or a path from"),
        (put(*SMALL, "arch", "../samba.yaml"), "arch: want a file in model/archs/, or a path from"),
        (put(*SMALL, "name", "../../etc"), "lab_stages[0].name: want a name (letters, digits"),
        (put(*VARS, "lab_run", ".."), "all.vars.lab_run: want a name (letters, digits"),
        (put(*VARS, "lab_probe_port", 29500), "lab_probe_port: 29500 is lab_port, too"),
        (put(*BOX, "ansible_host", "fd00::12"), "box2.ansible_host: want an IPv4 address"),
        (put(*VARS, "lab_secret", "in the clear"), "vault"),
    ],
)
def test_inventory_errors_are_named(change: Any, says: str) -> None:
    inventory = copy.deepcopy(example())
    change(inventory)
    errors = check.check(inventory)
    assert any(says in e for e in errors), errors
    assert not any("in the clear" in e for e in errors)


def test_checker_knows_the_keys_of_a_configuration() -> None:
    """It reads them off the source; here they are compared with the dataclasses."""
    from model import schema, sections

    assert {"Config", "OuterConfig", "RunConfig"} < set(check.SCHEMA)
    for name, keys in check.SCHEMA.items():
        cls = getattr(schema, name, None) or getattr(sections, name)
        assert list(keys) == [f.name.rstrip("_") for f in dataclasses.fields(cls)]
    kinds = {k: t for keys in check.SCHEMA.values() for k, t in keys.items() if t.endswith("Config")}
    assert kinds.keys() > {"run", "optim", "outer", "mup"} and set(kinds.values()) <= set(check.SCHEMA)


def test_stages_of_the_example_resolve() -> None:
    from model.config import load

    common = example()["all"]["vars"]
    for stage in common["lab_stages"]:
        outer = {f"outer.{key}": value for key, value in common["lab_outer"].items()}
        assert load(stage["arch"], stage["set"] | outer).outer.every == 50


def test_checker_exits_with_2_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yml"
    path.write_text((BOOKS / "inventory.example.yml").read_text().replace("lab_run:", "lab_runn:"))
    out = subprocess.run(
        [sys.executable, BOOKS / "inventory_check.py", path], capture_output=True, text=True, check=False
    )
    assert out.returncode == 2
    assert "unknown key 'lab_runn'; did you mean 'lab_run'?" in out.stderr
    path.write_text("all:\n  vars: {a: 1}\n  vars: {b: 2}\n")
    assert check.main([str(path)]) == 2
