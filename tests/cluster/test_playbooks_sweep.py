"""`sweep`: one question over two nodes, here two folders without ssh: it goes on, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments.__main__ import main as experiments
from tests.cluster.demo import settings
from tests.cluster.test_playbooks import BOOKS, ROOT, needs_ansible, play_here

SWEEP = """
question: Does the width matter?
arch: base.yaml
data:
  copying: {path: data/copying, make: [task, "copy:lengths=4", --samples, "40", --heldout-samples, "64"]}
cases:
  narrow: {}
  wide: {set: {dim: 24}}
seeds: 2
budget: {tokens: 640}
eval_tokens: 64
samples: 2
"""
BASE = """
dim: 16
stack: [{gla: {head_dim: 8}}, {mlp: {mult: 2, multiple_of: 8}}]
heads: {next: {shift: 1}}
run: {batch: 2, context: 32, precision: fp32, eval_every: 2, eval_tokens: 64, save_every: 2, log_every: 1}
"""


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)


class Two:
    """n1 and n2, set up, at a revision that has a small sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inventory, self.into = folder, folder / "inventory.yml", folder / "collected"
        self.code = folder / "n1" / "code"
        git(ROOT, "clone", "-q", "--shared", str(ROOT), str(self.code))
        (self.code / "experiments" / "tiny").mkdir()
        (self.code / "experiments" / "tiny" / "sweep.yaml").write_text(SWEEP)
        (self.code / "experiments" / "tiny" / "base.yaml").write_text(BASE)
        git(self.code, "add", "-A")
        git(self.code, "commit", "-qm", "A sweep")
        shutil.copytree(self.code, folder / "n2" / "code")
        for node in ("n1", "n2"):
            for name in ("etc", "state", "runs"):
                (folder / node / name).mkdir()
            shutil.copy(BOOKS / "files" / "supervise.py", folder / node / "etc")
        common = settings(6) | {"lab_deadline_s": 60, "lab_min_disk_gb": 0.01}
        hosts = {
            node: {"ansible_host": f"127.0.0.{i}", "lab_interface": "lo", "lab_root": str(folder / node)}
            for i, node in ((1, "n1"), (2, "n2"))
        }
        groups = {"server": {"hosts": {"n1": None}}, "workers": {"hosts": hosts}}
        self.inventory.write_text(yaml.safe_dump({"all": {"vars": common, "children": groups}}))

    def play(self, name: str, *words: str) -> tuple[int, str]:
        return play_here(self.inventory, name, "-e", f"into={self.into}", *words)

    def sweep(self, *words: str) -> tuple[int, str]:
        return self.play("sweep", "-e", "sweep=experiments/tiny", *words)

    def wait(self) -> None:
        """Until no node is at work. Raises AssertionError when one has failed."""
        for node in ("n1", "n2"):
            state, end = self.folder / node / "state" / "sweep", time.monotonic() + 300
            while (state / "pid.json").exists():
                assert time.monotonic() < end
                time.sleep(0.2)
            found = json.loads((state / "state.json").read_text())
            assert found["state"] == "done", (state / "log").read_text()

    def runs(self, node: str) -> list[str]:
        """Folders of the runs that a node trained."""
        found = (self.folder / node / "runs" / "sweeps" / "tiny").glob("*/run.json")
        return sorted(p.parent.name for p in found)


@pytest.fixture
def two(tmp_path: Path):
    nodes = Two(tmp_path)
    yield nodes
    assert nodes.play("stop")[0] == 0


@needs_ansible
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the node's service user is root")
def test_playbooks_sweep_is_spread_and_brought_together(two: Two) -> None:
    """Each trains its half; played again, all is merged and reported, and nothing is trained twice."""
    code, out = two.sweep("--check")
    assert code == 0 and not (two.folder / "n1" / "state" / "sweep").exists(), out
    code, out = two.sweep()
    assert code == 0 and "running" in out, out
    two.wait()
    mine, yours = two.runs("n1"), two.runs("n2")
    assert len(mine) == len(yours) == 2 and not {*mine} & {*yours}
    code, out = two.sweep()
    assert code == 0 and "python -m experiments merge experiments/tiny" in out, out
    two.wait()
    assert (two.runs("n1"), two.runs("n2")) == (mine, yours)
    files = [str(two.into / "sweeps" / "tiny" / f"{node}.jsonl") for node in ("n1", "n2")]
    home = two.code / "experiments" / "tiny"
    assert experiments(["merge", str(home), *files]) == 0
    assert experiments(["report", str(home), "--out", str(two.folder)]) == 0
    assert "wide" in (two.folder / "results.md").read_text()
    # the file of n1 was fetched before n2's runs were taken in; by now each has all
    whole = (home / "summaries.jsonl").read_text()
    for node in ("n1", "n2"):
        found = two.folder / node / "runs" / "sweeps" / "tiny" / "summaries.jsonl"
        assert sorted(found.read_text().splitlines()) == sorted(whole.splitlines())


@needs_ansible
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the node's service user is root")
def test_playbooks_sweep_refuses_before_it_starts(two: Two) -> None:
    """No sweep, one that is none, a node that trains, other data, another revision: named; nothing runs."""

    def refused(word: str, *words: str, sweep: str = "experiments/tiny") -> None:
        code, out = two.play("sweep", "-e", f"sweep={sweep}", *words)
        assert code == 2 and word in out, out
        assert not any((two.folder / node / "state" / "sweep").exists() for node in ("n1", "n2"))

    code, out = two.play("sweep")
    assert code == 2 and "-e sweep=experiments/first" in out
    refused("say which sweep", sweep="experiments/../../etc")
    refused("experiments/tinny", sweep="experiments/tinny")
    supervise = [sys.executable, str(BOOKS / "files" / "supervise.py")]
    state = ["--state", str(two.folder / "n2" / "state" / "worker")]
    subprocess.run([*supervise, "start", *state, "--", "sleep", "600"], check=True)
    refused("n2 trains")
    subprocess.run([*supervise, "stop", *state], check=True)
    data = two.folder / "n2" / "code" / "data" / "copying"
    words = ["-m", "dataset", "task", "copy:lengths=8", "--samples", "8", "--out", str(data)]
    subprocess.run([sys.executable, *words], cwd=two.folder / "n2" / "code", check=True, capture_output=True)
    refused("the data of experiments/tiny differ: n1 has ")
    shutil.rmtree(data)
    git(two.folder / "n2" / "code", "commit", "-q", "--allow-empty", "-m", "Mine")
    refused("n2 has revision")
