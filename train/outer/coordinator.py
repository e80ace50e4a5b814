"""The asynchronous outer loop as a state machine: who works on what, and what a push does to θ.

Every change is an event, applied in order; nothing here reads a clock, draws a number or opens a socket.
So the simulator, the server and a server restarted from its journal all end in the same bits.

Shape legend: N values of θ.

A worker joins and gets a lease: a shard, so many steps, and the version of θ it starts from. It pushes
Δ = θ_base - θ_worker once, coded. The first push of a round opens a window of `grace` seconds; when it
closes (or when nobody else is at work) its pushes are applied in the order in which they came, each of them
one version, and only then is anybody given new work.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from train.outer import codec as codecs
from train.outer import rules
from train.outer.layout import fingerprint

NORMS = 128  # accepted pushes that an outlier is measured against
INSISTS = 4  # outliers of a shard in a row that are refused; what comes again then is a level, and no spike


@dataclass(frozen=True)
class Terms:
    """What all workers of a run agree on. n: values of θ; plain_from: where statistics begin in it.

    total: steps that every shard gets. The rest: see `model.sections.OuterConfig`.
    """

    n: int
    total: int
    plain_from: int
    every: int = 100
    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    codec: str = "fp32"
    density: float = 0.015625
    shards: int = 1
    delay: int = 0
    carry: float = 0.0
    dynamic: bool = True
    grace: float = 0.0
    stale: int = 64
    heartbeat: float = 10.0

    @property
    def cycle(self) -> int:
        return self.delay or self.shards


@dataclass
class Lease:
    """One dispatch: `steps` inner steps of `shard` from its step `first`, from version `base` of θ."""

    id: int
    shard: int
    first: int
    steps: int
    base: int


@dataclass
class Worker:
    """state: waiting for work, working, or gone. ended and verdict: of its last push; speed: steps/s.

    applied: the lease of its last push that was taken.
    """

    state: str = "waiting"
    lease: Lease | None = None
    ended: int = -1
    applied: int = -1
    verdict: str = ""
    speed: float = 0.0
    shard: int = -1
    heard: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    report: dict[str, Any] = field(default_factory=dict)


class Coordinator:
    """See the module. `now` is in seconds on any clock that never goes back."""

    def __init__(self, terms: Terms, theta: np.ndarray) -> None:
        if theta.shape != (terms.n,):
            raise ValueError(f"{theta.shape} values for a model of {terms.n}")
        self.terms, self.theta, self.version = terms, theta, 0
        self.codec = codecs.make(terms.codec, terms.density)
        zero = np.zeros_like(theta)
        self.memory = rules.Delayed(zero, zero.copy())
        self.workers: dict[str, Worker] = {}
        self.visited = [0] * terms.shards
        self.leases = 0
        self.window: list[tuple[str, np.ndarray]] = []
        self.opened = 0.0
        self.norms: deque[float] = deque(maxlen=NORMS)
        self.outliers = [0] * terms.shards  # of every shard, in a row
        self.rejected = 0

    # ------------------------------------------------------------------------- events

    def join(self, name: str, now: float) -> None:
        """A worker without work, new or back: whatever it was leased is free again."""
        w = self.workers.setdefault(name, Worker())
        w.state, w.lease, w.heard = "waiting", None, now
        self._settle(now)

    def push(self, name: str, lease: int, seconds: float, code: np.ndarray, now: float) -> str:
        """The verdict on a push; one that was judged before gets the same answer and changes nothing."""
        w = self.workers.get(name)
        if w is not None and w.ended == lease:
            return w.verdict
        if w is None or w.lease is None or w.lease.id != lease:
            return self._count(w, "lost")
        mine = w.lease
        delta = self.codec.decode(code, self.terms.n)
        verdict, norm = self._judge(mine, delta)
        w.state, w.lease, w.heard, w.ended, w.verdict = "waiting", None, now, lease, verdict
        if seconds > 0:
            w.speed = mine.steps / seconds
        self._count(w, verdict)
        if verdict == "applied":
            self.norms.append(norm)
            w.steps, w.applied = w.steps + mine.steps, lease
            self.visited[mine.shard] = max(self.visited[mine.shard], mine.first + mine.steps)
            if not self.window:
                self.opened = now
            self.window.append((name, delta))
        self._settle(now)
        return verdict

    def gone(self, name: str, now: float) -> None:
        """A worker was silent for too long. Its lease stays its own until somebody needs the shard."""
        w = self.workers[name]
        w.state = "gone"
        self._settle(now)

    def back(self, name: str, now: float) -> None:
        """A worker that had gone is heard of again, with its lease or, if that was given away, without."""
        w = self.workers[name]
        w.state, w.heard = ("working" if w.lease else "waiting"), now
        self._settle(now)

    def close(self, now: float) -> None:
        """The window's time is over."""
        self._settle(now)

    # ------------------------------------------------------------------------- questions

    def due(self) -> float | None:
        """When the open window closes at the latest."""
        return self.opened + self.terms.grace if self.window else None

    def silent(self, now: float) -> list[str]:
        """Workers not heard of for longer than a heartbeat may take."""
        limit = self.terms.heartbeat
        return [n for n, w in self.workers.items() if w.state != "gone" and now - w.heard > limit]

    def applied_of(self, name: str) -> int:
        """The lease of the last push of a worker that was taken; -1: none was."""
        w = self.workers.get(name)
        return w.applied if w else -1

    def lease_of(self, name: str) -> Lease | None:
        w = self.workers.get(name)
        return w.lease if w else None

    @property
    def done(self) -> bool:
        return not self.window and all(v >= self.terms.total for v in self.visited)

    # ------------------------------------------------------------------------- inside

    def _judge(self, lease: Lease, delta: np.ndarray) -> tuple[str, float]:
        norm = float(np.linalg.norm(delta))
        if not np.isfinite(norm):
            return "nonfinite", norm
        if self.version - lease.base > self.terms.stale:
            return "stale", norm
        row = self.outliers[lease.shard] + 1 if rules.outlier(norm, self.norms) else 0
        self.outliers[lease.shard] = row
        return ("outlier" if 0 < row <= INSISTS else "applied"), norm

    def _count(self, w: Worker | None, verdict: str) -> str:
        if w is not None:
            w.counts[verdict] = w.counts.get(verdict, 0) + 1
        self.rejected += verdict != "applied"
        return verdict

    def _settle(self, now: float) -> None:
        """Close the window when it is time, then give work to everybody who waits."""
        busy = any(w.state == "working" for w in self.workers.values())
        if self.window and busy and now < self.opened + self.terms.grace:
            return
        for _, delta in self.window:
            self._apply(delta)
        self.window = []
        waiting = [w for w in self.workers.values() if w.state == "waiting"]
        for w in sorted(waiting, key=lambda w: -w.speed):  # the last shards are not left to the slowest
            self._dispatch(w)

    def _apply(self, g: np.ndarray) -> None:
        t, cut = self.terms, self.terms.plain_from
        rule = rules.Step(t.lr, t.momentum, t.nesterov)
        old = self.theta
        self.theta, self.memory = rules.delayed(old, g, self.memory, rule, t.cycle, t.carry)
        self.theta[cut:] = old[cut:] - g[cut:] / t.cycle  # statistics are averaged, without momentum
        self.version += 1

    def _dispatch(self, w: Worker) -> None:
        """A lease on the least visited shard that nobody works on; its last one when several tie."""
        taken = {v.lease.shard for v in self.workers.values() if v.lease and v.state != "gone"}
        free = [s for s, v in enumerate(self.visited) if s not in taken and v < self.terms.total]
        if not free:
            return
        shard = min(free, key=lambda s: (self.visited[s], s != w.shard, s))
        for other in self.workers.values():
            if other.lease and other.lease.shard == shard:
                other.lease = None  # it had gone; its push would do the same steps a second time
        fastest = max((v.speed for v in self.workers.values() if v.state != "gone"), default=0.0)
        steps = self.terms.every
        if self.terms.dynamic:
            steps = rules.dynamic_steps(steps, w.speed, fastest)
        first = self.visited[shard]
        w.lease = Lease(self.leases, shard, first, min(steps, self.terms.total - first), self.version)
        w.state, w.shard = "working", shard
        self.leases += 1

    # ------------------------------------------------------------------------- memory

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(JSON values, arrays) from which `restore` makes the same coordinator."""
        rest = {
            "terms": asdict(self.terms),
            "version": self.version,
            "count": self.memory.count,
            "workers": {n: asdict(w) for n, w in self.workers.items()},
            "visited": self.visited,
            "leases": self.leases,
            "opened": self.opened,
            "norms": list(self.norms),
            "rejected": self.rejected,
            "outliers": self.outliers,
            "window": [name for name, _ in self.window],
        }
        tensors = {"theta": self.theta, "m": self.memory.m, "s": self.memory.s}
        return rest, tensors | {f"window{i}": d for i, (_, d) in enumerate(self.window)}

    @classmethod
    def restore(cls, rest: dict[str, Any], arrays: dict[str, np.ndarray]) -> Coordinator:
        self = cls(Terms(**rest["terms"]), arrays["theta"])
        self.memory = rules.Delayed(arrays["m"], arrays["s"], rest["count"])
        for name, w in rest["workers"].items():
            lease = Lease(**w.pop("lease")) if w["lease"] else (w.pop("lease"), None)[1]
            self.workers[name] = Worker(lease=lease, **w)
        for key in ("version", "visited", "leases", "opened", "rejected"):
            setattr(self, key, rest[key])
        self.outliers = rest.get("outliers", self.outliers)
        self.norms.extend(rest["norms"])
        self.window = [(name, arrays[f"window{i}"]) for i, name in enumerate(rest["window"])]
        return self

    def fingerprint(self) -> int:
        """Hash of θ: equal wherever the same events were applied."""
        return fingerprint([self.theta])
