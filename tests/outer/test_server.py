"""The server when its machine fails it: no space, no descriptors, a restart at the wrong moment."""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset.files import DatasetError
from tests.outer.test_async import IDENTITY, SECRET, serving, wait_for
from tests.outer.test_frames import TERMS, THETA, N
from train.errors import UserError
from train.outer import journal as journals
from train.outer.client import Link
from train.outer.journal import Journal
from train.outer.server import PROVE_S, STRANGERS, Server


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


ONES = np.ones(N, "float32").view(np.uint8)


def failing(times: int, then: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
    """A call that says the disk is full so many times, and then does what it should."""
    left = times

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return then(*args, **kwargs)

    return call


def joined(server: Server, name: str, **terms: Any) -> Link:
    link = Link(f"127.0.0.1:{server.address[1]}", SECRET, name, 60)
    link.join(replace(TERMS, **terms), IDENTITY, THETA)
    return link


def test_time_goes_on_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that could not be closed is closed when there is space again; a silent worker is found."""
    terms = {"grace": 0.01, "heartbeat": 3600.0}
    with serving(tmp_path) as server:
        links = [joined(server, name, **terms) for name in ("a", "b")]
        leases = [link.lease()[0] for link in links]
        whole = server.journal.append
        events = failing(3, whole)

        def append(meta: dict[str, Any], body: bytes | memoryview = b"") -> None:
            (whole if meta["kind"] == "push" else events)(meta, body)

        monkeypatch.setattr(server.journal, "append", append)
        monkeypatch.setattr(server._log, "write", failing(10**9), raising=False)
        assert links[0].push(leases[0].id, 1.0, ONES) == "applied"
        wait_for(lambda: server.core.version == 1)
        assert sum("No space left" in line for line in server.lines) == 1
        server.core.workers["b"].heard -= 7200
        wait_for(lambda: server.core.workers["b"].state == "gone")
        for link in links:
            link.close()


def test_a_server_without_space_for_a_snapshot_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one must be on the disk before anybody trains; any other may fail."""
    with serving(tmp_path, snapshot_every=1) as server:
        snapshot = server.journal.snapshot
        monkeypatch.setattr(server.journal, "snapshot", failing(1, snapshot))
        with pytest.raises(UserError, match=r"cannot begin.*No space left"):
            joined(server, "a")
        monkeypatch.setattr(server.journal, "snapshot", snapshot)
        link = joined(server, "a")
        monkeypatch.setattr(server.journal, "snapshot", failing(10**9))
        for _ in range(2):
            lease, _ = link.lease()
            assert link.push(lease.id, 1.0, ONES) == "applied"
        link.close()
        want = server.core.fingerprint()
    with serving(tmp_path) as server:
        assert server.core.fingerprint() == want and server.core.version == 2


def test_no_descriptor_left_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept() fails for a while: the server says so, and then takes connections again."""
    with serving(tmp_path) as server:

        class Listener:
            accept = staticmethod(failing(2, server._sock.accept))
            close, settimeout = server._sock.close, server._sock.settimeout

        monkeypatch.setattr(server, "_sock", Listener)
        wait_for(lambda: len(server.lines) == 2)
        joined(server, "a").close()
    want = "a connection could not be taken ([Errno 28] No space left on device)"
    assert server.lines == [want] * 2  # and that nobody came for a while is none


def test_strangers_are_few_and_not_for_long(tmp_path: Path) -> None:
    """Lines that are opened and say nothing take no place from a worker."""
    with serving(tmp_path) as server:
        strangers = [socket.create_connection(server.address, timeout=60) for _ in range(2 * STRANGERS)]
        link = joined(server, "a")
        assert len(server._strangers) <= STRANGERS
        hello = strangers[0].recv(4096)
        assert hello and not strangers[0].recv(4096)  # the oldest were closed
        server._past += 2 * PROVE_S
        while strangers[-1].recv(4096):  # the youngest, when their time was over
            pass
        assert not server._strangers and link.status()["workers"]  # the worker's line is still open
        for sock in strangers:
            sock.close()
        link.close()


def test_a_finished_server_that_is_started_again_waits_for_its_workers(tmp_path: Path) -> None:
    """--until-done: it ends when all have heard that the run is over, or are silent for a heartbeat."""
    with serving(tmp_path) as server:
        a, b = joined(server, "a"), joined(server, "b")
        for link, (lease, _) in [(link, link.lease()) for link in (a, b)]:
            assert link.push(lease.id, 1.0, ONES) == "applied"
        assert server.core.done
        a.close()
        b.close()
    with serving(tmp_path, until_done=True) as server:
        for link in (a, b):
            link.server, link.address = "again", server.address
        assert a.lease()[0] is None
        a.close()
        wait_for(lambda: not server._open)
        with server._changed:
            assert server._awaited(server.core) == ["b"]
        assert not server._stop.wait(0.3)  # six ticks
        assert b.lease()[0] is None
        b.close()
        wait_for(server._stop.is_set)
    with serving(tmp_path, until_done=True) as server:
        server.core.workers["a"].heard -= 7200
        server.core.workers["b"].heard -= 7200
        wait_for(server._stop.is_set)


def test_a_body_is_no_larger_than_the_model(tmp_path: Path) -> None:
    """Larger ones are refused by their header, as soon as the model is known; a late first θ is not."""
    n = 1 << 19  # 2 MB
    theta, terms = np.zeros(n, "float32"), {"n": n, "plain_from": n, "codec": "e3m0"}
    with serving(tmp_path) as server:
        link = Link(f"127.0.0.1:{server.address[1]}", SECRET, "a", 60)
        link.join(replace(TERMS, **terms), IDENTITY, theta)
        meta = {"terms": asdict(replace(TERMS, **terms)), "identity": IDENTITY, "lease": None}
        assert link.ask("join", meta, theta.data).kind == "ack"
        link.patience = 0.0
        with pytest.raises(UserError, match="no answer"):
            link.push(0, 1.0, np.zeros(4 * n + 1, np.uint8))
        wait_for(lambda: any(f"at most {4 * n} are taken" in line for line in server.lines))
        link.close()


def test_a_push_is_answered_with_version_and_staleness(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        a, b = joined(server, "a"), joined(server, "b")
        (first, _), (second, _) = a.lease(), b.lease()
        assert a.push(first.id, 1.0, ONES) == "applied" and (a.version, a.staleness) == (1, 0)
        assert b.push(second.id, 1.0, ONES) == "applied" and (b.version, b.staleness) == (2, 1)
        assert b.push(second.id, 1.0, ONES) == "applied" and (b.version, b.staleness) == (2, None)
        a.close()
        b.close()
