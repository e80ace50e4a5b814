"""The server of the asynchronous outer loop: `python -m train serve`. One thread a connection, one lock.

It knows no model: the first worker that joins brings the terms, the identity and the first θ, and binds the
folder to them. Every change is written to the journal before it is made and forced to the disk before it is
answered, so a server that is killed at any moment goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import DatasetError
from train.errors import UserError
from train.outer.coordinator import Coordinator, Terms
from train.outer.frames import META_LIMIT, Connection, Frame, FrameError
from train.outer.journal import Journal

LIMIT = 8 << 30  # bytes of the first θ, before it is known how large the model is
POLL_S = 5.0  # a worker that waits for work asks again after this long, so that a dead line is noticed
SKEW_S = 60.0
STRANGERS = 32  # connections that have not proved themselves; one more, and the oldest is closed
PROVE_S = 10.0  # that they have for it


class Server:
    """listen: (host, port), port 0 for any free one. Raises UserError when port or folder is taken."""

    def __init__(
        self,
        folder: Path,
        secret: bytes,
        listen: tuple[str, int],
        say: Callable[[str], None] = print,
        snapshot_every: int = 200,
        until_done: bool = False,
    ) -> None:
        self.secret, self.say, self.folder = secret, say, folder
        self.journal = Journal(folder, snapshot_every)
        self.identity: dict[str, str] = {}
        self.core: Coordinator | None = None
        self._changed = threading.Condition()
        self._open: dict[Connection, str] = {}
        self._told: set[str] = set()  # workers that know the run to be over
        self._strangers: dict[socket.socket, float] = {}  # since when, oldest first
        self.bytes: dict[str, list[int]] = {}
        self._past = 0.0
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._until_done = until_done
        self._recover()
        self._log = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        try:
            self._sock = socket.create_server(listen, family=_family(listen[0]))
        except OSError as error:
            self.journal.close()
            self._log.close()
            raise UserError(
                f"{listen[0]}:{listen[1]}: cannot listen there ({error.strerror}); give another --listen, or "
                f"stop what uses the port"
            ) from None
        self.address: tuple[str, int] = self._sock.getsockname()[:2]

    # ------------------------------------------------------------------------- life

    def _recover(self) -> None:
        found = self.journal.recover()
        if found is None:
            return
        rest, arrays = found
        self.identity, self._past = rest["identity"], rest["now"]
        self.core = Coordinator.restore(rest["core"], arrays)
        count = 0
        for event, body in self.journal.replay():
            self._past = max(self._past, event["now"])
            self._apply(event, body)
            count += 1
        for w in self.core.workers.values():
            w.heard = self.now()
        self.say(f"{self.folder}: version {self.core.version}, {count} events after the last snapshot")

    def now(self) -> float:
        """Seconds that this run has been served, over restarts; no clock of any other machine counts."""
        return self._past + time.monotonic() - self._began

    def run(self) -> None:
        """Serve until `stop`."""
        ticker = threading.Thread(target=self._ticks, daemon=True)
        ticker.start()
        self._sock.settimeout(0.2)
        while not self._stop.is_set():
            try:
                self._accept()
            except TimeoutError:
                continue
            except (OSError, RuntimeError) as error:  # no descriptor or thread left: others will go
                self.say(f"a connection could not be taken ({error})")
                self._stop.wait(1.0)
        ticker.join()
        with self._changed:
            for sock in [*self._strangers, *(c.sock for c in self._open)]:
                _shut(sock)
            if self.core is not None:
                self._snapshot()
            self.journal.close()
            with contextlib.suppress(OSError):
                self._log.close()
        self._sock.close()

    def stop(self) -> None:
        self._stop.set()

    def _accept(self) -> None:
        sock, peer = self._sock.accept()
        with self._changed:
            self._strangers[sock] = self.now()
            if len(self._strangers) > STRANGERS:
                self._send_off(next(iter(self._strangers)))
        threading.Thread(target=self._serve, args=(sock, peer), daemon=True).start()

    def _send_off(self, stranger: socket.socket) -> None:
        """Its thread finds the line closed, and ends."""
        del self._strangers[stranger]
        _shut(stranger)

    def _ticks(self) -> None:
        """What time brings about. Nothing that fails may end it: the next tick tries again."""
        last = ""
        while not self._stop.wait(0.05):
            try:
                with self._changed:
                    for sock in [s for s, since in self._strangers.items() if self.now() > since + PROVE_S]:
                        self._send_off(sock)
                    if self.core is not None:
                        self._tick(self.core, self.now())
                last = ""
            except Exception as error:
                if last != (last := repr(error)):
                    self.say(f"{error!r}; trying again")

    def _awaited(self, core: Coordinator) -> list[str]:
        """Workers that may yet come to hear that the run is over: they would not find the server."""
        return [n for n, w in core.workers.items() if n not in self._told and w.state != "gone"]

    def _tick(self, core: Coordinator, now: float) -> None:
        if self._until_done and core.done and not self._open and not self._awaited(core):
            self._stop.set()
        due = core.due()
        if due is not None and now >= due:
            self._event("close")
        for name in core.silent(now):
            self._event("gone", worker=name)
            self.say(f"{name}: silent for more than {core.terms.heartbeat:g} s")
            for connection in [c for c, n in self._open.items() if n == name]:
                _shut(connection.sock)

    # ------------------------------------------------------------------------- connections

    def _serve(self, sock: socket.socket, peer: Any) -> None:
        sock.settimeout(PROVE_S)
        connection = Connection(sock)
        sent = received = 0
        try:
            connection.accept(self.secret, LIMIT)
            with self._changed:
                self._strangers.pop(sock, None)
            sock.settimeout(None)
            while not self._stop.is_set():
                connection.reader.limit = self._limit()
                frame = connection.receive()
                name = str(frame.meta.get("worker", ""))
                with self._changed:
                    self._open[connection] = name
                answer = self._answer(frame)
                connection.send(answer)
                with self._changed:
                    if answer.meta.get("done"):
                        self._told.add(name)
                    total = self.bytes.setdefault(name, [0, 0]) if name else [0, 0]
                    total[0] += connection.received - received
                    total[1] += connection.sent - sent
                    sent, received = connection.sent, connection.received
        except FrameError as error:
            self.say(f"{peer[0]}:{peer[1]}: {error}; closed")
        except (ConnectionError, TimeoutError):
            pass  # the worker has left, or comes back over a new line; a stranger said nothing
        except OSError as error:
            self.say(f"{peer[0]}:{peer[1]}: {error}; closed")
        except (KeyError, TypeError, ValueError) as error:
            self.say(f"{peer[0]}:{peer[1]}: a request that makes no sense ({error!r}); closed")
        finally:
            with self._changed:
                self._open.pop(connection, None)
                self._strangers.pop(sock, None)
            connection.close()

    def _limit(self) -> int:
        """Bytes of the largest frame that a worker may send now."""
        core = self.core
        if core is None:
            return LIMIT
        n = core.terms.n  # a θ that comes too late to be the first is read, and not needed
        return max(META_LIMIT, 4 * n, core.codec.size(n))

    def _answer(self, frame: Frame) -> Frame:
        handlers = {"join": self._join, "wait": self._wait, "push": self._push, "beat": self._beat}
        if frame.kind == "status":
            with self._changed:
                return Frame("status", self.status())
        if frame.kind not in handlers:
            return Frame("refuse", {"why": f"no request of kind {frame.kind!r}"})
        with self._changed:
            if frame.kind != "join":
                if self.core is None or frame.meta["worker"] not in self.core.workers:
                    return Frame("refuse", {"why": "this server does not know the worker; it must join"})
                self._heard(frame.meta["worker"], frame.meta.get("report"))
            return handlers[frame.kind](frame)

    def _heard(self, name: str, report: dict[str, Any] | None) -> None:
        assert self.core is not None
        w = self.core.workers[name]
        if w.state == "gone":
            self._event("back", worker=name)
        w.heard = self.now()
        if report:
            w.report = report

    def _join(self, frame: Frame) -> Frame:
        meta = frame.meta
        terms = Terms(**meta["terms"])
        if self.core is None:
            if not len(frame.body):
                return Frame("wait", {"need": "theta"})
            theta = np.frombuffer(frame.body, "float32").copy()
            if theta.shape != (terms.n,) or not np.isfinite(theta).all():
                return Frame("refuse", {"why": f"first θ: {theta.size} values, want {terms.n}, finite"})
            self.core, self.identity = Coordinator(terms, theta), dict(meta["identity"])
            try:
                self.journal.snapshot(self._state)
            except (OSError, DatasetError) as error:
                self.core = None
                return Frame("refuse", {"why": f"the server cannot begin: {error}"})
        mine, theirs = {**asdict(self.core.terms), **self.identity}, {**asdict(terms), **meta["identity"]}
        differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if differ:
            listed = "; ".join(f"{k}: {mine.get(k)} here, {theirs.get(k)} there" for k in differ)
            return Frame("refuse", {"why": f"{meta['worker']} is of another run: {listed}"})
        skew = float(meta.get("time", time.time())) - time.time()
        if abs(skew) > SKEW_S:
            self.say(f"{meta['worker']}: its clock is {skew:+.0f} s off; harmless here, but not in its logs")
        name, lease = meta["worker"], self.core.lease_of(meta["worker"])
        resumed = lease is not None and lease.id == meta.get("lease")
        if resumed:
            self._heard(name, None)
        else:
            self._event("join", worker=name)
        return Frame("ack", {"resumed": resumed, "applied": self.core.applied_of(name)})

    def _wait(self, frame: Frame) -> Frame:
        core, name = self.core, frame.meta["worker"]
        assert core is not None
        end = time.monotonic() + min(POLL_S, core.terms.heartbeat / 2)
        while core.lease_of(name) is None and not core.done and time.monotonic() < end:
            self._changed.wait(end - time.monotonic())
        lease = core.lease_of(name)
        if lease is None and not core.done:
            return Frame("wait")
        if lease is not None and lease.base != core.version:
            self._event("join", worker=name)  # θ has moved since the lease was given: a new one from here
            return Frame("wait")
        fields: dict[str, Any] = {"lease": asdict(lease) if lease else None}
        fields |= {"done": core.done, "version": core.version}
        fields["hash"] = f"{core.fingerprint():016x}"
        return Frame("lease", fields, core.theta.tobytes())

    def _push(self, frame: Frame) -> Frame:
        core, meta = self.core, frame.meta
        assert core is not None
        want = core.codec.size(core.terms.n)
        if len(frame.body) != want:
            return Frame("refuse", {"why": f"a push of {len(frame.body)} bytes, want {want}"})
        w = core.workers[meta["worker"]]
        lease = core.lease_of(meta["worker"])
        if w.ended == meta["lease"]:
            return Frame("ack", {"verdict": w.verdict, "version": core.version, "stale": None})
        base = lease.base if lease else -1
        fields = {"worker": meta["worker"], "lease": int(meta["lease"]), "seconds": float(meta["seconds"])}
        stale = core.version - base if lease else None
        verdict = self._event("push", frame.body, **fields)
        self.record("push", **fields, verdict=verdict, stale=stale, bytes=want, **(meta.get("report") or {}))
        if verdict != "applied":
            self.say(f"{meta['worker']}: push of lease {meta['lease']} {verdict}")
        return Frame("ack", {"verdict": verdict, "version": core.version, "stale": stale})

    def _beat(self, frame: Frame) -> Frame:
        return Frame("ack")

    # ------------------------------------------------------------------------- changes

    def _event(self, kind: str, body: bytes | bytearray | memoryview = b"", **fields: Any) -> str:
        """Write one change down, then make it. The lock is held."""
        event = {"kind": kind, "now": self.now(), **fields}
        self.journal.append(event, memoryview(body))
        verdict = self._apply(event, body)
        if self.journal.full():
            self._snapshot()
        if kind != "push":
            self.record(kind, **fields)
        self._changed.notify_all()
        return verdict

    def _apply(self, event: dict[str, Any], body: bytes | bytearray | memoryview) -> str:
        core, now = self.core, event["now"]
        assert core is not None
        if event["kind"] == "push":
            code = np.frombuffer(body, np.uint8)
            return core.push(event["worker"], event["lease"], event["seconds"], code, now)
        if event["kind"] == "close":
            core.close(now)
        else:
            {"join": core.join, "gone": core.gone, "back": core.back}[event["kind"]](event["worker"], now)
        return ""

    def _snapshot(self) -> None:
        """Without one, a restart reads more of the journal, and that is all."""
        try:
            self.journal.snapshot(self._state)
        except (OSError, DatasetError) as error:
            self.say(f"no snapshot: {error}")

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        assert self.core is not None
        rest, arrays = self.core.state()
        return {"core": rest, "identity": self.identity, "now": self.now()}, arrays

    # ------------------------------------------------------------------------- watching

    def record(self, kind: str, **fields: Any) -> None:
        """One line of DIR/metrics.jsonl."""
        version = self.core.version if self.core else 0
        with contextlib.suppress(ValueError, OSError):  # closed, by a server that stops; or a full disk
            line = {"kind": kind, "version": version, **fields, "time": round(time.time(), 3)}
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()

    def status(self) -> dict[str, Any]:
        """What `python -m train status HOST:PORT` shows."""
        core, now = self.core, self.now()
        if core is None:
            return {"version": None, "workers": [], "shards": [], "total": 0, "done": False, "rejected": 0}
        rows = []
        for name, w in core.workers.items():
            up, down = self.bytes.get(name, [0, 0])
            lease = w.lease
            rows.append(
                {
                    "worker": name,
                    "state": w.state,
                    "shard": lease.shard if lease else None,
                    "base": lease.base if lease else None,
                    "stale": core.version - lease.base if lease else None,
                    "steps": w.steps,
                    "verdicts": w.counts,
                    "bytes_up": up,
                    "bytes_down": down,
                    "heard_s": round(now - w.heard, 1),
                    **{k: w.report.get(k) for k in ("loss", "tokens_per_s")},
                }
            )
        fields = {"version": core.version, "shards": core.visited, "total": core.terms.total}
        return {**fields, "workers": rows, "done": core.done, "rejected": core.rejected}


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
