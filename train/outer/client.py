"""A worker's line to the server: every request may be sent again, so a broken line only costs time.

Link      join, lease, push, status; reconnects until `patience` seconds have passed in which nothing moved
Pulse     says on a line and thread of its own that the worker lives, also while it computes or saves
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from train.errors import UserError
from train.outer.coordinator import Lease, Terms
from train.outer.frames import Connection, Frame, FrameError, address_of
from train.outer.layout import fingerprint
from train.outer.none import never

LIMIT = 8 << 30
LINE_S = 15.0  # without a byte moved the line is taken for dead; the server answers in 5
WAITS = ("join", "wait")
PAUSE_S = (0.05, 2.0)  # between two attempts: doubled from the first to the second


class Joined(NamedTuple):
    """resumed: the worker's lease is its own yet.    applied: the lease of its last push that was taken."""

    resumed: bool
    applied: int


class Stopped(Exception):
    """This worker was told to stop while it waited, and has nothing in hand that must be sent."""


class Link:
    """Requests of one worker. Raises UserError when the server refuses, or does not answer for too long.

    stopping: whether the worker has been told to stop; join and lease then raise Stopped rather than wait.
    version, staleness: of θ at the server, when it was last heard of; of the last push, in versions.
    """

    def __init__(
        self,
        server: str,
        secret: bytes,
        worker: str,
        patience: float = 60.0,
        stopping: Callable[[], bool] = never,
    ) -> None:
        self.stopping = stopping
        self.server, self.address = server, address_of(server)
        self.secret, self.worker, self.patience = secret, worker, patience
        self.sent = self.received = 0
        self.version: int | None = None
        self.staleness: int | None = None
        self._connection: Connection | None = None

    # ------------------------------------------------------------------------- requests

    def join(
        self, terms: Terms, identity: Mapping[str, str], theta: np.ndarray, lease: int | None = None
    ) -> Joined:
        """Take part, with the lease that this worker still has."""
        meta = {"terms": asdict(terms), "identity": dict(identity), "lease": lease, "time": time.time()}
        answer = self.ask("join", meta)
        if answer.kind == "wait":  # the first worker brings the first parameters
            answer = self.ask("join", meta, np.ascontiguousarray(theta, "float32").data)
        return Joined(bool(answer.meta["resumed"]), int(answer.meta["applied"]))

    def lease(self) -> tuple[Lease | None, np.ndarray]:
        """The next work and θ [N] to start from, as soon as there is some; (None, θ) when the run is over."""
        while True:
            answer = self.ask("wait", {})
            if answer.kind == "lease":
                break
            if self.stopping():
                raise Stopped
        theta = np.frombuffer(answer.body, "float32").copy()
        if f"{fingerprint([theta]):016x}" != answer.meta["hash"]:
            raise UserError(f"{self.server}: its parameters do not have the hash that it gave")
        fields, self.version = answer.meta["lease"], answer.meta["version"]
        return (Lease(**fields) if fields else None), theta

    def push(self, lease: int, seconds: float, code: np.ndarray, report: dict[str, Any] | None = None) -> str:
        """The verdict on a delta: applied, stale, outlier, nonfinite or lost. Safe to repeat."""
        meta = {"lease": lease, "seconds": seconds, "report": report}
        answer = self.ask("push", meta, np.ascontiguousarray(code).data).meta
        self.version, self.staleness = answer["version"], answer["stale"]
        return str(answer["verdict"])

    def status(self) -> dict[str, Any]:
        return self.ask("status", {}).meta

    # ------------------------------------------------------------------------- the line

    def ask(self, kind: str, meta: dict[str, Any], body: bytes | memoryview = b"") -> Frame:
        """One request and its answer, over a new connection when the old one broke."""
        pause, end, why = PAUSE_S[0], time.monotonic() + self.patience, "no answer"
        while True:
            began = time.monotonic()
            try:
                return self._try(Frame(kind, {**meta, "worker": self.worker}, body))
            except (OSError, FrameError) as error:
                why = str(error) or type(error).__name__
                if self._connection is not None:  # a long frame that was under way is no silence
                    end += max(0.0, self._connection.moved - began)
                self.close()
            if kind in WAITS and self.stopping():
                raise Stopped
            if time.monotonic() + pause > end:
                raise UserError(
                    f"{self.server}: no answer for {self.patience:g} s ({why}); is the server up?  "
                    f"python -m train serve --listen {self.server} --dir DIR"
                )
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])

    def _try(self, frame: Frame) -> Frame:
        before = (0, 0) if self._connection is None else (self._connection.sent, self._connection.received)
        if self._connection is None:
            sock = socket.create_connection(self.address, timeout=10)
            self._connection = Connection(sock, LIMIT)
            self._connection.greet(self.secret, LIMIT)
            sock.settimeout(LINE_S)
        line = self._connection
        try:
            line.send(frame)
            answer = line.receive()
        finally:
            self.sent += line.sent - before[0]
            self.received += line.received - before[1]
        if answer.kind == "refuse":
            self.close()
            raise UserError(f"{self.server}: {answer.meta.get('why')}")
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Pulse:
    """A beat every `every` seconds while the worker lives; a beat that fails is tried again at the next."""

    def __init__(self, server: str, secret: bytes, worker: str, every: float) -> None:
        self._link = Link(server, secret, worker, patience=0.0)
        self._end = threading.Event()
        self.report: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(every,), daemon=True)
        self._thread.start()

    def _run(self, every: float) -> None:
        while not self._end.wait(every):
            with contextlib.suppress(UserError, OSError):
                self._link.ask("beat", {"report": self.report})

    @property
    def traffic(self) -> tuple[int, int]:
        return self._link.sent, self._link.received

    def close(self) -> None:
        self._end.set()
        self._thread.join(timeout=2)
        self._link.close()
