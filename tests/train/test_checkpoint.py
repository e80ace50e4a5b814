"""Checkpoints are whole or absent; whatever happens during a save, the one before still loads."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from train import checkpoint
from train.errors import CheckpointError, DiskFull

MODEL = {"w": torch.arange(6.0).view(2, 3), "scale": torch.tensor(2.0)}
TRAIN = {
    "optimizer": {"w": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(3.0)}},
    "counters": {"step": 3},
    "plateau": {"history": [[0.1 + 0.2, 1e-300]], "hits": 0},
    "list": [torch.zeros(1), {"deep": torch.ones(2)}],
}


def save(run: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(run, step, MODEL, TRAIN, "dim: 1\n", keep)


def test_round_trip_is_exact(tmp_path) -> None:
    loaded = checkpoint.load(save(tmp_path, 3))
    assert loaded.step == 3 and all(torch.equal(loaded.model[k], MODEL[k]) for k in MODEL)
    assert loaded.train["plateau"] == TRAIN["plateau"]
    assert torch.equal(loaded.train["optimizer"]["w"]["exp_avg"], torch.ones(2, 3))
    assert torch.equal(loaded.train["list"][1]["deep"], torch.ones(2))
    assert (checkpoint.folder_of(tmp_path) / "latest").read_text() == "step_00000003"


def test_retention_keeps_the_newest(tmp_path) -> None:
    for step in range(5):
        save(tmp_path, step, keep=1)
    assert [p.name for p in checkpoint.saved(tmp_path)] == ["step_00000004", "step_00000003"]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAIN, checkpoint.REST, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((bad / name).read_bytes())
    if damage == "remove":
        (bad / name).unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        (bad / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        checkpoint.load(bad)
    path, complaints = checkpoint.newest(tmp_path)
    assert path == good and "step_00000002" in complaints[0]


def test_an_existing_checkpoint_is_never_written_to(tmp_path) -> None:
    path = save(tmp_path, 1)
    before = (path / checkpoint.MODEL).stat().st_ino
    assert save(tmp_path, 1) == path and (path / checkpoint.MODEL).stat().st_ino == before
    (path / checkpoint.MODEL).write_bytes(b"x")
    save(tmp_path, 1)
    assert checkpoint.verify(path) == 1
    assert (path.with_suffix(".aside0") / checkpoint.MODEL).read_bytes() == b"x"


@pytest.mark.parametrize("call", range(9))
def test_a_save_that_dies_anywhere_leaves_the_old_one(tmp_path, monkeypatch, call) -> None:
    """Every durable step of a save in turn does not return: as if the power went there."""
    good = save(tmp_path, 1)
    count = 0

    class Power(BaseException):
        pass

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count - 1 == call:
                raise Power
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(os, "rename", dying(os.rename))
    with pytest.raises(Power):
        save(tmp_path, 2)
    monkeypatch.undo()
    path, _ = checkpoint.newest(tmp_path)
    assert path is not None and checkpoint.load(path).step in (1, 2)
    assert checkpoint.load(good).step == 1
    save(tmp_path, 3)  # and what was left half-written is no obstacle
    assert not list(checkpoint.folder_of(tmp_path).glob("*.tmp"))
    assert checkpoint.newest(tmp_path)[0].name == "step_00000003"


def test_full_disk_is_told_and_touches_nothing(tmp_path, monkeypatch) -> None:
    good = save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"no space left for 1\.0 MB .* earlier checkpoints are untouched"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == (good, []) and len(list(good.parent.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs: needs root")
def test_a_really_full_disk(tmp_path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        big = {"w": torch.randn(200_000)}  # 0.8 MB
        first = checkpoint.save(tmp_path, 1, big, {}, "", keep=9)
        with pytest.raises(DiskFull):  # found out beforehand
            checkpoint.save(tmp_path, 2, {"w": torch.randn(600_000)}, {}, "", keep=9)
        (tmp_path / "other").write_bytes(bytes(1_600_000))
        slack, checkpoint.SLACK = checkpoint.SLACK, -(1 << 30)  # found out while writing
        try:
            with pytest.raises(DiskFull):
                checkpoint.save(tmp_path, 3, big, {}, "", keep=9)
        finally:
            checkpoint.SLACK = slack
        assert checkpoint.saved(tmp_path) == [first] and torch.equal(
            checkpoint.load(first).model["w"], big["w"]
        )
        assert not list(checkpoint.folder_of(tmp_path).glob("*.tmp"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
