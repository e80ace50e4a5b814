"""`python -m train status RUN [--watch]`: a run and its workers, until it ends."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from train import rundir
from train.__main__ import main, watch


def record(run: Path, step: int, **more: Any) -> None:
    fields = {"tokens": 64 * step, "loss": 2.5, "losses": {"next": 2.5}, "tokens_per_s": 100.0, **more}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": step, **fields}) + "\n")


def test_the_table_is_live_until_the_run_ends(tmp_path, capsys) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "run.json").write_text("{}")
    rundir.set_status(run, "running", step=0, total=9)
    record(run, 3)
    with rundir.locked(run):
        watching = threading.Thread(target=watch, args=([run], 0.01))
        watching.start()
        record(run, 7)
        time.sleep(0.2)
        assert watching.is_alive()
    watching.join(60)
    assert not watching.is_alive()
    assert "7/9" in capsys.readouterr().out
    assert main(["status", str(run), "--watch"]) == 0  # nothing is running: once, and done
    shown = capsys.readouterr().out
    assert "interrupted" in shown and "7/9" in shown


def test_workers_are_shown_with_what_they_sent(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    traffic = {"sent": 1_240_000, "received": 2_000_000, "rounds": 3, "dropped": 0}
    names = ["tiny", "tiny/workers/1", "tiny/workers/2", "tiny/workers/10"]
    for run in map(Path, reversed(names)):
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text("{}")
        rundir.set_status(run, "complete", step=9, total=9)
        record(run, 9, outer=traffic)
    assert main(["status", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("│")[1].strip() for line in lines if "complete" in line]
    assert shown == names
    text = "\n".join(lines)
    assert text.count("rounds 3, dropped 0") == 4 and text.count("1.2 MB sent") == 4
    assert "…" not in text  # no column is cut where there is no terminal
