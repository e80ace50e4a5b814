"""Running the lab's own commands, as a user would type them, from the demo and the studies."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from train.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("data/pystdlib")
PREPARE = (
    *("-m", "dataset", "prepare", "--source", "pystdlib", "--tokenizer", "smollm2-135m-instruct"),
    *("--merges", "2048", "--out", str(DATA)),
)


def run(*words: str | Path) -> None:
    """`python WORDS...` in the project's folder, echoed. Raises SystemExit with the command's exit code.

    A signal that is to end us is left to the command, which saves first; then raises SystemExit(130 or 143).
    """
    line = [str(w) for w in words]
    print(f"\n$ python {shlex.join(line)}", flush=True)
    caught: list[int] = []
    process = subprocess.Popen([sys.executable, *line], cwd=ROOT)

    def hand_on(number: int, _: object) -> None:
        caught.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the whole group of processes by itself
            process.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED if signal.SIGINT in caught else EXIT_TERMINATED)
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
