"""wandb gets the numbers of `metrics.jsonl`, all of them and nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from train import mirror

RECORDS = [
    {"kind": "event", "step": 0, "event": "start"},
    {"kind": "train", "step": 2, "tokens": 64, "loss": 2.5, "losses": {"n": 2.25}, "mfu": None, "time": 1.5},
    {"kind": "eval", "step": 2, "tokens": 64, "bpb": {"next": 3.5}, "stats": {"q/usage": 0.5}, "time": 1.75},
    {"kind": "sites", "step": 3, "bank": {"b0": {"rms": 1.25}}, "time": 2.0},
    {"kind": "sample", "step": 3, "text": "no number"},
]  # fmt: skip
WANT = {
    2: {"train/tokens": 64, "train/loss": 2.5, "train/losses/n": 2.25, "train/time": 1.5,
        "eval/tokens": 64, "eval/bpb/next": 3.5, "eval/stats/q/usage": 0.5, "eval/time": 1.75},
    3: {"sites/bank/b0/rms": 1.25, "sites/time": 2.0},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (tmp_path / "run.json").write_text(json.dumps({"name": "tiny", "created": 1.0}))
    return tmp_path


def test_every_number_is_sent_once(run) -> None:
    sent: dict[int, dict] = {}
    ended = threading.Event()
    ended.set()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # still being written
    mirror.follow(run, lambda fields, step: sent.setdefault(step, {}).update(fields), ended)
    assert sent == WANT


@pytest.mark.slow
def test_the_offline_file_holds_them(run) -> None:
    """watching: what wandb would send later, read back from its own file."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    tracker = mirror.start(run, "offline")
    ended = threading.Event()
    ended.set()
    mirror.follow(run, lambda fields, step: tracker.log(fields, step=step), ended)
    tracker.finish()
    (path,) = run.rglob("run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    found: dict[int, dict] = {}
    while data := store.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        if items:
            found[items["_step"]] = {k: v for k, v in items.items() if not k.startswith("_")}
    assert found == WANT
