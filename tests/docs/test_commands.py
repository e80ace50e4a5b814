"""Every command of the documentation has a rule, and its flags parse. Fast: nothing is run.

A command line is handed to its own `__main__`, which is stopped as soon as its parser is content. So the test
knows no parser, and what is refused there is refused here.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from experiments.reference import commands as known_commands
from model import config
from tests.docs.pages import PROGRAMS, ROOT, Command, begins, commands
from tests.docs.rules import RULES, rule_of

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
COMMANDS = commands()
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*$")
FILLED = {"METHOD": "condense", "i/n": "0/4", "$i/4": "0/4", "$SLURM_ARRAY_TASK_ID/256": "0/256"}


class Parsed(BaseException):
    """A parser was content; nothing that catches errors may catch it."""

    def __init__(self, found: argparse.Namespace) -> None:
        self.found = found


def text_of(command: Command) -> str:
    return command.text


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 90
    assert {c.page for c in COMMANDS} >= {"README.md", "train/README.md", "dataset/README.md"}


@pytest.mark.parametrize("command", COMMANDS, ids=text_of)
def test_there_is_a_rule(command: Command) -> None:
    rule = rule_of(command.text)
    assert rule is not None, f"{command.page}: add a rule to tests/docs/rules.py for {command.text}"


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.pattern[:30])
def test_rules_say_why(rule) -> None:
    assert rule.reason or (rule.how == "run" and not rule.extra)
    assert {*rule.needs} <= {c.text for c in COMMANDS}


PARSED = [c for c in COMMANDS if (r := rule_of(c.text)) is None or r.how != "foreign"]


@pytest.mark.parametrize("command", PARSED, ids=text_of)
def test_flags_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.text)
    while ENVIRONMENT.match(words[0]):
        words.pop(0)
    check(words, monkeypatch)


def test_a_wrong_flag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (
        "python train/pretrain.py --arch samba --stepz 3",
        "python train/pretrain.py --arch samba --set run.stepz=3",
        "torchrun --no-such-flag train/pretrain.py --arch samba",
        "python -m dataset prepare --source a",
        "python -m model shew samba",
        "make no-such-target",
        "bash train/run/gone.sh",
        "ansible-playbook -i inventory.yml playbooks/gone.yml",
    ):
        with pytest.raises((AssertionError, SystemExit, config.ConfigError)):
            check(shlex.split(text), monkeypatch)


def check(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Raises SystemExit, AssertionError or ConfigError for what would not run."""
    program, *rest = words
    if program == "make":
        check_target(rest)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        shown = [w for w in rest if w != "..."]
        launch = get_args_parser().parse_args(shown)
        check_python([launch.training_script, *launch.training_script_args], "..." in rest, patch)
    elif program in ("ansible-playbook", "play"):
        books = [w for w in rest if w.endswith(".yml") and "/" not in w.removeprefix("playbooks/")]
        gone = [b for b in books if not (ROOT / "playbooks" / b.removeprefix("playbooks/")).is_file()]
        assert not set(gone) - {"inventory.yml", "vault.yml"}, gone  # those are the reader's
    elif program == "python":
        check_python([w for w in rest if w != "..."], "..." in rest, patch)


def check_target(words: list[str]) -> None:
    """The target is in the Makefile; a slow area has tests."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = words[0]
    assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no target {target}"
    for word in words[1:]:
        name, _, value = word.partition("=")
        assert f"$({name}" in makefile or f"$(if $({name})" in makefile
        if name == "AREA":
            tests = [
                p for p in (ROOT / "tests").rglob("test_*.py") if "slow" in p.read_text(encoding="utf-8")
            ]
            names = (
                str(p.relative_to(ROOT)) + "".join(re.findall(r"def test_\w+", p.read_text())) for p in tests
            )
            assert any(value in name for name in names), f"no slow test has {value} in its name"


def check_python(words: list[str], partial: bool, patch: pytest.MonkeyPatch) -> None:
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    module = words[0] == "-m"
    name, argv = (words[1], words[2:]) if module else (words[0], words[1:])
    if name == "pytest":
        assert (ROOT / argv[0]).exists()
        return
    if partial or (module and len(argv) == 1 and rule_names(name, argv[0])):
        assert not module or not argv or rule_names(name, argv[0]), f"no command {name} {argv[0]}"
        return
    file = ROOT / (name.replace(".", "/") + ".py" if module else name)
    file = file if file.is_file() else ROOT / name.replace(".", "/") / "__main__.py"
    assert file.is_file(), f"{name}: not there"
    if "parse_args(" in file.read_text(encoding="utf-8"):
        found = parsed(name, module, [filled(w) for w in argv], patch)
        if file.name == "pretrain.py" and found is not None:
            for arch in found.arch:
                if (ROOT / "model" / "archs" / f"{arch.removesuffix('.yaml')}.yaml").is_file():
                    config.load(arch, found.sets)


def rule_names(package: str, word: str) -> bool:
    return f"python -m {package} {word}" in known_commands()


def filled(word: str) -> str:
    """A word of a template as a reader would type it: no brackets of what may be left out."""
    word = FILLED.get(word, word)
    return word.strip("[]") if re.match(r"\[--|[^\[]*\]$", word) else word


def parsed(name: str, module: bool, argv: list[str], patch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """What the command's own parser makes of it; None after --help. Raises SystemExit(2)."""
    real = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))

    with patch.context() as m:
        m.setattr(argparse.ArgumentParser, "parse_args", stop)
        m.setattr(sys, "argv", [name, *argv])
        m.setattr(sys, "path", [str(ROOT), *sys.path])
        m.chdir(ROOT)
        try:
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except Parsed as stopped:
            return stopped.found
        except SystemExit as ended:
            if ended.code not in (0, None) or "--help" not in argv:
                raise
            return None
    raise AssertionError(f"{name} never asked its parser")


def test_lines_of_other_programs_are_known() -> None:
    assert begins("BASE=x bash train/run/train.sh", PROGRAMS) and not begins("echo a", PROGRAMS)
    assert Path(ROOT / "Makefile").is_file()
