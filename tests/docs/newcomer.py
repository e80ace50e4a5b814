"""`make newcomer`: the README's first half hour on a fresh clone, by the clock.

Clones the last commit into a folder of its own, makes its environment and types the README's commands in
their order, up to three goals: a model that is trained, a sweep that is reported, a decoder that is
compressed. Ends with a table of minutes since the clone began. A command that fails ends it with that
command's exit code.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.docs.pages import ROOT, commands
from tests.docs.rules import CONDENSE, FIRST, PREPARE, TRAIN

REPORT = "python -m experiments report experiments/first"
GOALS = {
    TRAIN: "a model is trained, 100 steps",
    REPORT: "a sweep of four runs is reported",
    CONDENSE: "a decoder's context is compressed, and the compressor tested",
}


def path() -> list[str]:
    """The README's commands that lead to the goals, in its order. Raises LookupError if one is gone."""
    said = [c.text for c in commands() if c.page == "README.md"]
    wanted = {PREPARE, FIRST, *GOALS}
    if gone := wanted - set(said):
        raise LookupError(f"README.md no longer says {sorted(gone)}; mend tests/docs/rules.py")
    return [text for text in said if text in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="an empty or new folder to clone into [a temporary one]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as scratch:
        return walk(args.out or Path(scratch) / "lab")


def walk(folder: Path) -> int:
    """Types every command in `folder`; the exit code of the first that fails, or 0."""
    began, rows = time.monotonic(), []
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{folder / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"
    for text in (
        f"git clone --quiet {shlex.quote(str(ROOT))} {shlex.quote(str(folder))}",
        "make setup",
        *path(),
    ):
        start = time.monotonic()
        print(f"$ {text}", flush=True)
        code = subprocess.run(
            shlex.split(text), cwd=folder if rows else ROOT, env=env, check=False
        ).returncode
        if code:
            print(f"newcomer: exit code {code}: {text}", file=sys.stderr)
            return code
        now = time.monotonic()
        rows.append((text.replace(str(ROOT), "..."), now - start, now - began, GOALS.get(text, "")))
    print("\n| command | seconds | minutes since the clone began | |\n|---|---|---|---|")
    for text, took, since, goal in rows:
        print(f"| `{text.split(' --quiet')[0]}` | {took:.0f} | {since / 60:.1f} | {goal} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
