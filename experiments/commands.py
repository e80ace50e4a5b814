"""Running the lab's own commands, as a user would type them, from the demo and the studies."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("data/pystdlib")
PREPARE = (
    *("-m", "dataset", "prepare", "--source", "pystdlib", "--tokenizer", "smollm2-135m-instruct"),
    *("--merges", "2048", "--out", str(DATA)),
)


def run(*words: str | Path) -> None:
    """`python WORDS...` in the project's folder, echoed. Raises SystemExit with the command's exit code."""
    line = [str(w) for w in words]
    print(f"\n$ python {shlex.join(line)}", flush=True)
    code = subprocess.run([sys.executable, *line], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)


def ensure_data() -> Path:
    """The standard corpus, prepared if it is not there yet."""
    if not (ROOT / DATA / "manifest.json").is_file():
        run(*PREPARE)
    return ROOT / DATA


def pretrain(archs: Sequence[str | Path], *rest: str | Path, sets: Sequence[str] = ()) -> None:
    """`train/pretrain.py` on these architectures; finished runs are left as they are, begun ones resumed."""
    words: list[str | Path] = ["train/pretrain.py", "--resume"]
    for arch in archs:
        words += ["--arch", arch]
    words += rest
    for item in sets:
        words += ["--set", item]
    run(*words)
