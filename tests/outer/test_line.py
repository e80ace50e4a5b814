"""A worker's line: slow is not dead."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from tests.outer.test_async import IDENTITY, SECRET
from tests.outer.test_frames import TERMS, THETA
from train.errors import UserError
from train.outer import client
from train.outer.client import Link, Stopped
from train.outer.frames import Connection, Frame


class Clock:
    """In place of the module `time`: nobody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowSocket:
    """Ten kB a second and a timeout of 15 s, as Python has it: of a call, so of the whole of a `sendall`."""

    RATE, ROOM, LIMIT = 10_000, 64 << 10, 15.0

    def __init__(self) -> None:
        self.got = bytearray()

    def setsockopt(self, *_: Any) -> None: ...

    def send(self, data: Any) -> int:
        self.got += data[: self.ROOM]
        return min(len(data), self.ROOM)

    def sendall(self, data: Any) -> None:
        if len(data) / self.RATE > self.LIMIT:
            raise TimeoutError("timed out")
        self.got += data


def test_a_push_may_take_longer_than_the_timeout_of_the_line() -> None:
    """200 s of bytes, never 15 s without one."""
    sock = SlowSocket()
    line = Connection(sock)  # type: ignore[arg-type]
    body = bytes(range(256)) * 8000
    line.send(Frame("push", {"lease": 1}, body))
    assert body in sock.got and line.sent == len(sock.got)


def test_patience_is_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that breaks after 100 s of sending is tried again; a server that says nothing is given up."""
    clock, tries = Clock(), 0
    monkeypatch.setattr(client, "time", clock)
    link = Link("127.0.0.1:9", SECRET, "a", patience=60.0)

    def cut(frame: Frame) -> Frame:
        nonlocal tries
        tries += 1
        if tries == 3:
            return Frame("ack")
        clock.now += 100.0
        link._connection = SimpleNamespace(moved=clock.now, close=lambda: None)  # type: ignore[assignment]
        raise ConnectionError("cut")

    monkeypatch.setattr(link, "_try", cut)
    assert link.ask("push", {}).kind == "ack"

    def silent(frame: Frame) -> Frame:
        clock.now += 15.0
        raise TimeoutError("timed out")

    monkeypatch.setattr(link, "_try", silent)
    began = clock.now
    with pytest.raises(UserError, match="no answer for 60 s"):
        link.ask("push", {})
    assert clock.now - began < 100


def test_who_waits_can_be_stopped() -> None:
    """A request for work is given up, whether the server has none or is not there; a push is not."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        link = Link(f"127.0.0.1:{taken.getsockname()[1]}", SECRET, "a", 3600.0, stopping=lambda: True)
        with pytest.raises(Stopped):
            link.lease()
        with pytest.raises(Stopped):
            link.join(TERMS, IDENTITY, THETA)
        link.patience = 0.0
        with pytest.raises(UserError, match="no answer"):
            link.push(0, 1.0, THETA)
