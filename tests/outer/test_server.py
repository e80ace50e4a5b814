"""The server when its machine fails it: no space, no descriptors, a restart at the wrong moment."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dataset.files import DatasetError
from tests.outer.test_frames import THETA
from train.outer import journal as journals
from train.outer.journal import Journal


@contextmanager
def files_of_at_most(n: int) -> Iterator[None]:
    """The system writes no file past n bytes: a write that wants to is cut there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def replayed(folder: Path) -> list[int]:
    journal = Journal(folder)
    _, arrays = journal.recover() or ({}, {})
    assert np.array_equal(arrays["theta"], THETA)
    found = [m["i"] for m, _ in journal.replay()]
    journal.close()
    return found


@pytest.mark.parametrize("restarted", [False, True])
def test_an_event_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, restarted: bool) -> None:
    """What was acknowledged after it is still there after a restart."""
    journal = Journal(tmp_path)
    journal.snapshot(lambda: ({}, {"theta": THETA}))
    journal.append({"i": 0}, bytes(1000))
    if restarted:
        journal.close()
        with open(tmp_path / "journal_00000000", "ab") as file:
            file.write(bytes(300))  # half an event, of a kill
        journal = Journal(tmp_path)
        journal.recover()
        assert len(list(journal.replay())) == 1
    with files_of_at_most(1500), pytest.raises(OSError, match=r"File too large"):
        journal.append({"i": 1}, bytes(100_000))
    journal.append({"i": 2}, bytes(1000))
    assert journal.events == 2
    journal.close()
    assert replayed(tmp_path) == [0, 2]


def test_a_snapshot_that_cannot_be_written_leaves_the_journal_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it was written but is not known to be on the disk: it must not hide the old journal."""
    journal = Journal(tmp_path)
    journal.snapshot(lambda: ({}, {"theta": THETA}))
    whole = journals.write_bytes

    def unsure(path: Path, data: bytes) -> None:
        whole(path, data)
        raise DatasetError(f"{path}: {errno.errorcode[errno.EIO]}")

    monkeypatch.setattr(journals, "write_bytes", unsure)
    for i in range(2):
        journal.append({"i": i})
        with pytest.raises(DatasetError):
            journal.snapshot(lambda: ({}, {"theta": THETA * 2}))
    journal.close()
    assert replayed(tmp_path) == [0, 1]
    monkeypatch.undo()
    journal = Journal(tmp_path)
    journal.recover()
    list(journal.replay())
    journal.snapshot(lambda: ({}, {"theta": THETA}))
    journal.close()
    assert replayed(tmp_path) == []
