"""kill -9 at random moments, in the middle of steps and of saves; the end is bit-equal all the same."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import PRETRAIN, environment, equal
from train import checkpoint
from train.metrics import read
from train.pretrain import main

KILLS = 20
KEYS = ("kind", "step", "tokens", "loss", "losses", "bpb", "grad_norm", "lr", "stats", "text")


def losses(run: Path) -> list[tuple]:
    """What was logged, without clocks."""
    return [tuple(repr(r.get(k)) for k in KEYS) for r in read(run) if r["kind"] != "event"]


def tensors(run: Path) -> dict:
    end = checkpoint.load(checkpoint.saved(run)[0])
    moments = {f"{n}/{k}": v for n, m in end.train["optimizer"].items() for k, v in m.items()}
    return {**end.model, **moments}


def start_and_kill(words: list[str], cwd: Path, run: Path, delay: float, in_save: bool) -> tuple[int, bool]:
    """Start a run and kill it `delay` seconds after its first new checkpoint, or in the save after that.

    Returns its exit code, and whether it left a save half done.
    """
    folder, output = checkpoint.folder_of(run), cwd / "output.txt"
    before = [p.name for p in checkpoint.saved(run)[:1]]
    with open(output, "wb") as out:
        process = subprocess.Popen(words, cwd=cwd, env=environment(), stdout=out, stderr=out)

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not condition():
            time.sleep(0.0005)

    try:
        wait(lambda: [p.name for p in checkpoint.saved(run)[:1]] != before)
        time.sleep(delay)
        if in_save:
            wait(lambda: any(folder.glob("*.tmp/model.safetensors")))
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -signal.SIGKILL), output.read_text()
    return process.returncode, bool({p.suffix for p in folder.iterdir()} & {".tmp", ".gone"})


@pytest.mark.slow
def test_resume_after_kill_9_at_random_moments(place, data, monkeypatch) -> None:
    monkeypatch.chdir(place)
    sets = ["--set", "run.steps=1200", "--set", "run.eval_every=50"]
    base = ["--arch", "tiny.yaml", "--data", str(data), *sets]
    assert main([*base, "--run", "whole", "--set", "run.save_every=0"]) == 0
    rng, saving, kills, run = random.Random(0), 0, 0, place / "killed"
    words = [sys.executable, str(PRETRAIN), *base, "--run", "killed", "--resume", "--set", "run.save_every=2"]
    for k in range(KILLS):
        code, was_saving = start_and_kill(words, place, run, rng.uniform(0, 0.3), in_save=k % 2 == 1)
        kills, saving = kills + (code != 0), saving + was_saving
    assert kills == KILLS, "the run ended before all kills; give it more steps"
    assert saving >= KILLS // 4, "too few kills hit a save"
    reached = checkpoint.newest(run)[0]
    assert reached is not None and 0 < checkpoint.verify(reached) < 1200
    assert main([*base, "--run", "killed", "--resume", "--set", "run.save_every=0"]) == 0
    assert equal(tensors(place / "whole"), tensors(run))
    assert losses(place / "whole") == losses(run)
    steps = [r["step"] for r in read(run) if r["kind"] == "train"]
    assert steps == sorted(set(steps))  # the same batches, each logged once
    print(f"{kills} kills, {saving} of them in the middle of a save; last resumed from {reached.name}")
