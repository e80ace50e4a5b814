"""Which stage `launch` starts: played on this machine, without ssh, with a stand-in for what it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.demo import settings
from tests.cluster.test_playbooks import BOOKS, ROOT, needs_ansible, play_here

# Server: a port that is open; worker: sleep; anything else (`model show`): the lab.
PROGRAM = """\
#!/bin/sh
case "$*" in
  *"-m train serve"*) exec {python} -c 'import socket, sys, time
where = sys.argv[sys.argv.index("--listen") + 1].rpartition(":")
server = socket.create_server((where[0], int(where[2])))
time.sleep(600)' "$@" ;;
  *torch.distributed.run*) exec sleep 600 ;;
  *) exec {python} "$@" ;;
esac
"""


class Here:
    """One node that is set up: server and worker, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.lab, program, self.inventory = folder / "lab", folder / "python", folder / "inventory.yml"
        for name in ("etc", "state", "runs", "data/x"):
            (self.lab / name).mkdir(parents=True)
        subprocess.run(["git", "clone", "-q", "--shared", ROOT, self.lab / "code"], check=True)
        (self.lab / "etc" / "supervise.py").write_text((BOOKS / "files" / "supervise.py").read_text())
        (self.lab / "etc" / "secret").write_text("s" * 32)
        (self.lab / "data" / "x" / "manifest.json").write_text("{}")
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)
        common = settings(6) | {"lab_root": str(self.lab), "lab_python": str(program), "lab_deadline_s": 5}
        common |= {"lab_port": 28000 + os.getpid() % 500, "lab_data": {"dir": "data/x", "source": "pystdlib"}}
        groups = {
            "server": {"hosts": {"n1": None}},
            "workers": {"hosts": {"n1": {"ansible_host": "127.0.0.1", "lab_interface": "lo"}}},
        }
        self.inventory.write_text(yaml.safe_dump({"all": {"vars": common, "children": groups}}))

    def play(self, name: str, *words: str) -> tuple[int, str]:
        return play_here(self.inventory, name, *words)

    def stages(self) -> set[str]:
        """Of the server, and of the commands that are written down."""
        found = {(self.lab / "etc" / "stage").read_text().strip()}
        for name in ("server", "worker"):
            found |= set(re.findall(r"# .*, stage (\w+)", (self.lab / "etc" / f"{name}.sh").read_text()))
        return found


@pytest.fixture
def here(tmp_path: Path) -> Any:
    node = Here(tmp_path)
    yield node
    assert node.play("stop")[0] == 0


@needs_ansible
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the node's service user is root")
def test_playbooks_launch_keeps_the_stage(here: Here) -> None:
    """The first; another takes the place neither of one that runs nor of the one that `grow` brought."""
    assert here.play("launch")[0] == 0 and here.stages() == {"one"}
    code, out = here.play("launch", "-e", "lab_stage_name=two")
    assert code == 2 and "n1: the server runs stage one of demo, not two of demo" in out
    assert here.stages() == {"one"}
    code, out = here.play("launch", "-e", "lab_run=other")
    assert code == 2 and "n1: the server runs stage one of demo, not one of other" in out
    code, out = here.play("launch", "-e", "lab_stage_name=three")
    assert code == 2 and "no stage is called three; lab_stages has one, two" in out
    run = here.lab / "runs" / "demo" / "one" / "worker"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"status": "running"}')
    (run / "config.yaml").write_text("{}")
    for words in (("--check",), ()):
        code, out = here.play("grow", "-e", "now=true", *words)
        assert code == 0 and here.stages() == ({"one"} if words else {"two"}), out
    code, out = here.play("launch")
    assert code == 0 and here.stages() == {"two"} and re.search(r"n1 .*changed=0 ", out)
    assert here.play("stop")[0] == 0
    assert here.play("launch")[0] == 0 and here.stages() == {"two"}


@needs_ansible
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the node's service user is root")
def test_playbooks_an_only_worker_comes_back(here: Here) -> None:
    """There is nobody to give it data; it has its own."""
    assert here.play("launch")[0] == 0
    assert here.play("drain", "-e", "node=n1")[0] == 0 and (here.lab / "etc" / "drained").exists()
    secret = ("-e", "lab_secret=" + "s" * 32)
    code, out = here.play("add-worker", "-e", "node=n1", *secret)
    assert code == 0 and not (here.lab / "etc" / "drained").exists(), out
    assert '"running"' in here.play("status")[1].replace("\\", "")


@needs_ansible
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the node's service user is root")
def test_playbooks_launch_refuses_a_value_that_is_none(here: Here) -> None:
    here.inventory.write_text(here.inventory.read_text().replace("codec: int8", "codec: int9"))
    code, out = here.play("launch")
    assert code == 2 and "did you mean 'int8'?" in out
    assert not (here.lab / "etc" / "stage").exists() and not list((here.lab / "state").iterdir())
