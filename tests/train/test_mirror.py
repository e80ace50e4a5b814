"""wandb gets the numbers of `metrics.jsonl`, all of them and nothing else."""

from __future__ import annotations

import json
import struct
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import train.metrics
from train import mirror
from train.pretrain import main

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
        file.write('{"kind": "train", "st\n')  # cut off by a crash
        file.write('{"kind": "train", "step": 4, "lo')  # still being written
    mirror.follow(run, lambda fields, step: sent.setdefault(step, {}).update(fields), ended)
    assert sent == WANT


def test_folders_without_run_json_are_runs_of_their_own(tmp_path, monkeypatch) -> None:
    """As `train/compress.py` makes them."""
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: options)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, again, b = (mirror.start(tmp_path / name, "offline") for name in ("a", "a", "b"))
    assert (a["name"], b["name"]) == ("a", "b") and a["id"] == again["id"] != b["id"]


BLOCK, HEAD = 1 << 15, struct.Struct("<IHB")  # of a LevelDB log: crc, length, kind
FULL, LAST = 1, 4


def entries(data: bytes) -> Iterator[bytes]:
    """Of wandb's file, a LevelDB log behind 7 bytes of its own (wandb has no reader in Python any more)."""
    assert data.startswith(b":W&B")
    at, whole = 7, b""
    while at + HEAD.size <= len(data):
        room = BLOCK - at % BLOCK
        _, size, kind = HEAD.unpack_from(data, at)
        if room < HEAD.size or not kind:  # the rest of a block is empty
            at += room
            continue
        whole += data[at + HEAD.size : at + HEAD.size + size]
        at += HEAD.size + size
        if kind in (FULL, LAST):
            yield whole
            whole = b""


def offline(path: Path) -> dict[int, dict[str, Any]]:
    """{step: fields} of a wandb file, without what wandb adds."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in entries(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        if items:
            found[items["_step"]] = {k: v for k, v in items.items() if not k.startswith("_")}
    return found


def test_a_run_with_wandb_offline_writes_what_metrics_jsonl_holds(place, data, monkeypatch) -> None:
    """By a process of its own: the training neither imports wandb nor waits for it."""
    monkeypatch.chdir(place)
    # However slow this machine is, wandb may finish here; a training waits for 20 s at its end.
    monkeypatch.setattr(train.metrics, "stop_mirror", partial(train.metrics.stop_mirror, patience_s=600))
    before = "wandb" in sys.modules
    words = ["--arch", "tiny.yaml", "--data", str(data), "--run", "run", "--set", "wandb=offline"]
    assert main([*words, "--set", "run.stats_every=6"]) == 0
    assert ("wandb" in sys.modules) == before
    (path,) = (place / "run").rglob("run-*.wandb")
    want: dict[int, dict[str, float]] = {}
    for record in train.metrics.read(place / "run"):
        kind, step = record.pop("kind"), record.pop("step")
        if kind in ("train", "eval", "sites"):
            want.setdefault(step, {}).update({f"{kind}/{k}": v for k, v in mirror.flat(record).items()})
    assert sorted(want) == [0, 3, 4, 6, 8, 9, 12] and "sites/activations" in " ".join(want[6])
    assert offline(path) == want, (place / "run" / "wandb.log").read_text()
