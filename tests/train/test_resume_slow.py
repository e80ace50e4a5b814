"""kill -9 at random moments, in the middle of steps and of saves; the end is bit-equal all the same."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
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


def start_and_kill(words: list[str], cwd: Path, run: Path, delay: float) -> tuple[int | None, bool]:
    """Start a run, kill it `delay` seconds after it began to log. (exit code, whether it was saving)"""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.is_file() else 0
    output = cwd / "output.txt"
    with open(output, "wb") as out:
        process = subprocess.Popen(words, cwd=cwd, env=environment(), stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -signal.SIGKILL), output.read_text()
    folder = checkpoint.folder_of(run)
    left = {p.suffix for p in folder.iterdir()} if folder.is_dir() else set()
    return process.returncode, bool(left & {".tmp", ".gone"})


@pytest.mark.slow
def test_resume_after_kill_9_at_random_moments(place, data, monkeypatch) -> None:
    monkeypatch.chdir(place)
    sets = ["--set", "run.steps=1500", "--set", "run.eval_every=50"]
    base = ["--arch", "tiny.yaml", "--data", str(data), *sets]
    assert main([*base, "--run", "whole", "--set", "run.save_every=0"]) == 0
    rng, saving, kills, run = random.Random(0), 0, 0, place / "killed"
    words = [sys.executable, str(PRETRAIN), *base, "--run", "killed", "--resume", "--set", "run.save_every=2"]
    for _ in range(KILLS):
        code, was_saving = start_and_kill(words, place, run, rng.uniform(0, 0.8))
        kills, saving = kills + (code != 0), saving + was_saving
    assert kills == KILLS, "the run ended before all kills; give it more steps"
    assert saving > 0, "no kill hit a save; save more often"
    reached = checkpoint.newest(run)[0]
    assert reached is not None and 0 < checkpoint.verify(reached) < 1500
    assert main([*base, "--run", "killed", "--resume", "--set", "run.save_every=0"]) == 0
    assert equal(tensors(place / "whole"), tensors(run))
    assert losses(place / "whole") == losses(run)
    steps = [r["step"] for r in read(run) if r["kind"] == "train"]
    assert steps == sorted(set(steps))  # the same batches, each logged once
    print(f"{kills} kills, {saving} of them in the middle of a save; last resumed from {reached.name}")
