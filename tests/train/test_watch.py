"""`python -m train status RUN --watch` follows a run and ends with it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from train import rundir
from train.__main__ import main, watch


def record(run: Path, step: int) -> None:
    fields = {"tokens": 64 * step, "loss": 2.5, "losses": {"next": 2.5}, "tokens_per_s": 100.0}
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
