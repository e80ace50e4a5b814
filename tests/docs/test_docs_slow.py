"""`make test-docs`: the commands of the documentation are run, in a copy of the project.

Each in a process of its own, as a reader would type it, behind those that it needs; `rules.py` shortens them.
The copy holds what git tracks and what it would track; data, runs and models are made there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, commands
from tests.docs.rules import rule_of
from tests.docs.test_commands import ENVIRONMENT

RUN = [c.text for c in commands() if (r := rule_of(c.text)) is not None and r.how == "run"]
LIMIT_S = 1800
PROGRAM = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


class Workspace:
    """A copy of the project, and what was run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, subprocess.CompletedProcess[str]] = {}

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        """Once, after what it needs."""
        if text not in self.done:
            rule = rule_of(text)
            assert rule is not None and rule.how == "run", text
            for other in rule.needs:
                before = self.run(other)
                assert before.returncode == 0, f"{other}\n{before.stdout}{before.stderr}"
            self.done[text] = self.start(text, rule.extra)
        return self.done[text]

    def start(self, text: str, extra: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        words = shlex.split(text)
        own = dict(word.split("=", 1) for word in takewhile(ENVIRONMENT.match, words))
        program, *rest = words[len(own) :]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "WANDB_MODE": "disabled", **own}
        env.pop("PYTHONPATH", None)
        return subprocess.run(
            [*PROGRAM.get(program, [program]), *rest, *extra],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("docs") / "lab"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return Workspace(folder)


@pytest.mark.slow
@pytest.mark.parametrize("text", RUN)
def test_docs_command_runs(text: str, workspace: Workspace) -> None:
    done = workspace.run(text)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_docs_commands_are_those_of_the_copy(workspace: Workspace) -> None:
    """What runs is the copy's code, not an installation elsewhere."""
    found = workspace.start("python -c 'import model; print(model.__file__)'", ())
    assert Path(found.stdout.strip()).is_relative_to(workspace.folder), found.stdout + found.stderr
