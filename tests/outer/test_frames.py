"""What a stranger, a liar or a broken line can do to the server: nothing."""

from __future__ import annotations

import random
import socket
import struct
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.outer.test_async import IDENTITY, SECRET, serving, wait_for
from train.errors import UserError
from train.outer.client import Link
from train.outer.coordinator import Terms
from train.outer.frames import (
    HEADER,
    KINDS,
    MAGIC,
    SMALL,
    TAG,
    Connection,
    Frame,
    FrameError,
    Reader,
    address_of,
    pack,
    secret_of,
)
from train.outer.journal import Journal
from train.outer.server import Server

KEY = bytes(range(32))
N = 16
TERMS = Terms(n=N, total=100, plain_from=N, shards=2, heartbeat=600.0)
THETA = np.arange(N, dtype="float32")


def parse(data: bytes, key: bytes = KEY, limit: int = 1 << 20) -> Frame:
    """One frame from a byte string that ends."""
    at = 0

    def take(n: int) -> bytearray:
        nonlocal at
        if at + n > len(data):
            raise FrameError("cut off")
        at += n
        return bytearray(data[at - n : at])

    return Reader(key, limit).read(take)


def wire(frame: Frame, number: int = 0) -> bytes:
    return b"".join(pack(frame, KEY, number))


def test_a_frame_arrives() -> None:
    frame = parse(wire(Frame("push", {"lease": 3}, b"abc")))
    assert (frame.kind, frame.meta, bytes(frame.body)) == ("push", {"lease": 3}, b"abc")


def test_100_000_frames_of_garbage() -> None:
    """Random bytes, cut frames, changed bytes, forged lengths: each is refused, none takes memory."""
    rng = random.Random(0)
    good = wire(Frame("push", {"worker": "a", "lease": 3, "seconds": 1.5}, bytes(range(64))))
    refused = 0
    for i in range(100_000):
        kind = i % 5
        if kind == 0:
            data = rng.randbytes(rng.randrange(0, 200))
        elif kind == 1:
            data = good[: rng.randrange(len(good))]
        elif kind == 2:
            at = rng.randrange(len(good))
            data = good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
        elif kind == 3:
            head = HEADER.pack(MAGIC, rng.randrange(256), rng.getrandbits(32), rng.getrandbits(64), 0)
            data = head + rng.randbytes(64)
        else:
            cut = rng.randrange(HEADER.size, len(good))
            data = good[:cut] + rng.randbytes(rng.randrange(1, 50)) + good[cut:]
            if data.startswith(good):
                data = data[:cut]  # what was put in happened to be what stood there
        try:
            parse(data)
        except FrameError:
            refused += 1
    assert refused == 100_000


def test_lengths_are_refused_before_memory_is_taken() -> None:
    asked: list[int] = []

    def take(n: int) -> bytearray:
        asked.append(n)
        return bytearray(HEADER.pack(MAGIC, 0, 10, 1 << 40, 0))

    with pytest.raises(FrameError, match="at most 4096"):
        Reader().read(take)
    assert asked == [HEADER.size]


def test_frames_cannot_be_repeated_left_out_or_used_elsewhere() -> None:
    reader = Reader(KEY, 1 << 20)
    first, second = wire(Frame("beat"), 0), wire(Frame("beat"), 1)

    def feed(data: bytes) -> Frame:
        pieces = iter([data[: HEADER.size], data[HEADER.size : -TAG], b"", data[-TAG:]])
        return reader.read(lambda n: bytearray(next(pieces)))

    with pytest.raises(FrameError, match="number 1, expected 0"):
        feed(second)
    feed(first)
    with pytest.raises(FrameError, match="number 0, expected 1"):
        feed(first)
    with pytest.raises(FrameError, match="tag"):
        parse(first, key=bytes(32))


def test_the_server_outlives_strangers(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        link = Link(at, SECRET, "a", 60)
        link.join(TERMS, IDENTITY, THETA)
        before = server.core.fingerprint()
        rng = random.Random(1)
        for i in range(60):
            sock = socket.create_connection(server.address, timeout=60)
            if i % 3 == 0:
                sock.sendall(rng.randbytes(rng.randrange(1, 3 * SMALL)))
            elif i % 3 == 1:
                sock.sendall(HEADER.pack(MAGIC, 1, SMALL, 0, 0) + b"half")
            sock.close()
        with pytest.raises(UserError, match="another secret"):
            Link(at, b"not the secret, but long", "b", 60).join(TERMS, IDENTITY, THETA)
        with pytest.raises(UserError, match="must join"):
            Link(at, SECRET, "stranger", 60).push(0, 1.0, np.zeros(4 * N, np.uint8))
        with pytest.raises(UserError, match=f"a push of 400 bytes, want {4 * N}"):
            link.push(0, 1.0, np.zeros(400, np.uint8))
        lease, theta = link.lease()
        assert lease is not None and np.array_equal(theta, THETA)
        assert server.core.fingerprint() == before and server.core.version == 0
        assert link.push(lease.id, 1.0, server.core.codec.encode(np.ones(N, "float32"))) == "applied"
        link.close()
        wait_for(lambda: any("wrong secret" in line for line in server.lines))


def test_half_a_push_is_discarded(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        link = Link(f"127.0.0.1:{server.address[1]}", SECRET, "a", 60)
        link.join(TERMS, IDENTITY, THETA)
        lease, _ = link.lease()
        line = link._connection
        meta = {"lease": lease.id, "seconds": 1.0, "worker": "a"}
        pieces = b"".join(pack(Frame("push", meta, bytes(4 * N)), line.key, line.number))
        line.sock.sendall(pieces[: len(pieces) // 2])
        link.close()
        wait_for(lambda: "a" not in server._open.values())  # it has noticed
        assert server.core.version == 0 and server.core.lease_of("a") == lease
        code = server.core.codec.encode(np.ones(N, "float32"))
        assert link.push(lease.id, 1.0, code) == "applied"  # sent again, whole, over a new line
        assert link.push(lease.id, 1.0, code) == "applied" and server.core.version == 1
        link.close()


def test_a_push_larger_than_any_is_refused_by_its_header(tmp_path: Path) -> None:
    """From a worker that knows the secret; before memory is taken. Nothing is applied, the server is up."""
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        link = Link(at, SECRET, "a", 60)
        link.join(TERMS, IDENTITY, THETA)
        lease, _ = link.lease()
        line, before = link._connection, server.core.fingerprint()
        line.sock.settimeout(60)
        line.sock.sendall(HEADER.pack(MAGIC, KINDS.index("push"), 2, 1 << 40, line.number))
        with pytest.raises(ConnectionError):
            line.receive()
        wait_for(lambda: any(f"a frame of 2 + {1 << 40} bytes, at most" in x for x in server.lines))
        assert server.core.fingerprint() == before and server.core.version == 0
        code = server.core.codec.encode(np.ones(N, "float32"))
        assert link.push(lease.id, 1.0, code) == "applied"
        link.close()


def test_first_parameters_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        link = Link(f"127.0.0.1:{server.address[1]}", SECRET, "a", 60)
        with pytest.raises(UserError, match="first θ"):
            link.join(TERMS, IDENTITY, THETA * np.nan)
        assert server.core is None


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else can
        with pytest.raises(UserError, match=r"no answer for 0.3 s .*python -m train serve"):
            Link(f"127.0.0.1:{taken.getsockname()[1]}", SECRET, "a", 0.3).status()


def test_port_and_folder_in_use(tmp_path: Path) -> None:
    with serving(tmp_path / "a") as server:
        with pytest.raises(UserError, match="cannot listen there"):
            Server(tmp_path / "b", SECRET, ("127.0.0.1", server.address[1]))
        with pytest.raises(UserError, match="another server works here"):
            Server(tmp_path / "a", SECRET, ("127.0.0.1", 0))


def test_a_clock_that_is_off_does_no_harm(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        link = Link(f"127.0.0.1:{server.address[1]}", SECRET, "late", 60)
        meta = {"terms": asdict(TERMS), "identity": IDENTITY, "lease": None, "time": time.time() - 7200}
        assert link.ask("join", meta, THETA.tobytes()).meta == {"resumed": False, "applied": -1}
        lease, _ = link.lease()
        code = server.core.codec.encode(np.ones(N, "float32"))
        assert link.push(lease.id, 1.0, code) == "applied"
        link.close()
    assert any("clock is -7200 s off" in line for line in server.lines)


def test_a_journal_is_full_by_events_or_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart reads it whole, so 200 pushes of a large model are too much."""
    journal = Journal(tmp_path, every=3)
    journal.snapshot(lambda: ({}, {"theta": THETA}))
    journal.append({}, bytes(100))
    assert not journal.full()
    monkeypatch.setattr("train.outer.journal.LARGE", 50)
    monkeypatch.setattr("train.outer.journal.TIMES", 0)
    assert journal.full()
    monkeypatch.setattr("train.outer.journal.TIMES", 1000)
    assert not journal.full()
    journal.append({})
    journal.append({})
    assert journal.full()
    journal.close()


def test_a_journal_cut_anywhere_keeps_every_whole_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.snapshot(lambda: ({"x": 1}, {"theta": THETA}))
    for i in range(5):
        journal.append({"i": i}, bytes([i]) * 100)
    journal.close()
    path = tmp_path / "journal_00000000"
    data = path.read_bytes()
    size = len(data) // 5
    for cut in (0, 3, size - 1, size, 2 * size + 7, len(data) - 1, len(data)):
        path.write_bytes(data[:cut])
        journal = Journal(tmp_path)
        rest, arrays = journal.recover() or ({}, {})
        assert rest == {"x": 1} and np.array_equal(arrays["theta"], THETA)
        assert [m["i"] for m, _ in journal.replay()] == list(range(cut // size))
        journal.append({"i": 9})
        journal.close()
        journal = Journal(tmp_path)
        journal.recover()
        assert [m["i"] for m, _ in journal.replay()][-1] == 9
        journal.close()


def test_a_damaged_snapshot_falls_back_to_the_one_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.snapshot(lambda: ({"v": 1}, {"theta": THETA}))
    journal.append({"i": 0})
    journal.snapshot(lambda: ({"v": 2}, {"theta": THETA}))
    journal.close()
    (tmp_path / "snapshot_00000001.safetensors").write_bytes(b"half")
    journal = Journal(tmp_path)
    assert (journal.recover() or ({}, {}))[0] == {"v": 1} and len(list(journal.replay())) == 1
    journal.close()


def test_secrets_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        secret_of(str(file))
    file.chmod(0o600)
    assert secret_of(str(file)) == b"0123456789abcdef"
    monkeypatch.delenv("LATENT_LAB_SECRET", raising=False)
    with pytest.raises(UserError, match="at least 16 characters"):
        secret_of(None)
    assert address_of("10.0.0.1:80") == ("10.0.0.1", 80) and address_of("[::1]:80") == ("::1", 80)
    for bad in ("host", "host:", ":80", "host:99999", "host:x"):
        with pytest.raises(UserError, match="want HOST:PORT"):
            address_of(bad)


def test_a_connection_needs_a_handshake(tmp_path: Path) -> None:
    """Requests under the open key, before the secret was proved, are not answered."""
    with serving(tmp_path) as server:
        line = Connection(socket.create_connection(server.address, timeout=60))
        line.receive()
        line.send(Frame("status"))
        with pytest.raises((ConnectionError, FrameError)):
            while line.receive().kind == "refuse":
                pass
        line.close()
    assert struct.calcsize(">4sB3xIQQ") == HEADER.size == 28
