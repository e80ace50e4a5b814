"""Async DiLoCo (2401.09135), the worker's side; `coordinator` holds the other.

Shape legend: N values of the travelling tensors.

A worker takes a lease (a shard of the data, its next steps, the version of θ to start from), trains, pushes
Δ = θ_base - θ_local, and takes the next. It does not wait for others. Data and learning rate follow the
shard's own step count; inner optimizer states stay with the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from model.sections import OuterConfig
from train.outer import codec as codecs
from train.outer import layout
from train.outer.client import Joined, Link, Pulse, Stopped
from train.outer.codec import Sender
from train.outer.coordinator import Lease, Terms
from train.outer.frames import secret_of
from train.outer.layout import Fragment
from train.outer.none import NoOuter, Place, never


def terms_of(config: OuterConfig, parts: Sequence[Fragment], total: int) -> Terms:
    """What this run agrees on with the server. total: steps of every shard."""
    n = sum(f.size for f in parts)
    plain = sum(f.size for f in parts if not f.plain)
    names = (n for n in Terms.__dataclass_fields__ if n not in ("n", "total", "plain_from"))
    return Terms(n=n, total=total, plain_from=plain, **{name: getattr(config, name) for name in names})


class Async(NoOuter):
    """One worker. `lead` runs an action on the rank that holds the line and gives all ranks its result.

    A worker that was killed and comes back finds its lease gone to another or still its own; either way it
    loses at most what it did since its last checkpoint.

    Error feedback counts what arrived: a push that is refused leaves the residual as it was before, and a
    worker that comes back from a checkpoint drops the residual that a push since then has taken along.
    """

    def __init__(
        self,
        config: OuterConfig,
        parts: Sequence[Fragment],
        identity: Mapping[str, str],
        total: int,
        worker: str,
        lead: Callable[[Callable[[], Any]], Any] = lambda action: action(),
    ) -> None:
        self.config, self.parts, self.worker, self._lead = config, list(parts), worker, lead
        self.identity = {**identity, "tensors": layout.signature(self.parts)}
        self.terms = terms_of(config, self.parts, total)
        self.sender = Sender(codecs.make(config.codec, config.density), self.terms.n, config.feedback)
        self.lease: Lease | None = None
        self.base: np.ndarray | None = None
        self.did = 0  # steps of the lease behind us
        self.seconds = 0.0
        self.done = False
        self.verdicts: dict[str, int] = {}
        self.loss: float | None = None
        self._since: float | None = None
        self._link: Link | None = None
        self._pulse: Pulse | None = None

    # ------------------------------------------------------------------------- the loop's side

    def begin(self, state: Any, stopping: Callable[[], bool] = never) -> None:
        """Join, with the lease of the checkpoint if it is still ours. Raises UserError."""
        server = str(self.config.server)

        def join() -> Joined | None:
            secret = secret_of(self.config.secret_file)
            self._link = Link(server, secret, self.worker, self.config.patience, stopping)
            lease = self.lease.id if self.lease else None
            try:
                joined = self._link.join(self.terms, self.identity, self._local(), lease)
            except Stopped:
                return None
            self._pulse = Pulse(server, secret, self.worker, self.config.heartbeat / 3)
            return joined

        joined = self._lead(join)
        if joined is None:
            return
        if self.lease is not None and joined.applied >= self.lease.id:
            self.sender.residual = None
        if not joined.resumed:
            self._take()
        self._since = time.monotonic()

    def place(self, step: int) -> Place:
        """The next step's place. step: of this worker; not used, the lease knows."""
        return Place(self.lease.shard, self.lease.first + self.did) if self.lease else Place(0, 0)

    def maybe_sync(self, state: Any) -> None:
        """Called after every inner step; pushes at the end of a lease and takes the next."""
        if self.lease is None:
            return
        self.did += 1
        if self.did < self.lease.steps:
            return
        self._clock()
        lease, seconds = self.lease, self.seconds
        assert self.base is not None
        delta = self.base - self._local()

        def push() -> str:
            assert self._link is not None
            report = {"loss": self.loss, "steps_per_s": lease.steps / seconds if seconds else None}
            return self._link.push(lease.id, seconds, self.sender.encode(delta), report)

        before = self.sender.residual
        verdict = self._lead(push)
        if verdict != "applied":
            self.sender.residual = before
        self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1
        self._take()

    def finished(self, state: Any) -> bool:
        """Whether every shard has had its steps."""
        return self.done

    def boundary(self, step: int) -> bool:
        return self.did == 0

    def agree(self, stopping: bool) -> bool:
        """A worker may stop whenever it likes."""
        return stopping

    def close(self) -> None:
        for part in (self._pulse, self._link):
            if part is not None:
                part.close()

    # ------------------------------------------------------------------------- inside

    def _take(self) -> None:
        """Wait for the next lease and start from its θ. Told to stop meanwhile: no lease, and not done."""

        def ask() -> tuple[Lease | None, np.ndarray] | None:
            assert self._link is not None
            with suppress(Stopped):
                return self._link.lease()
            return None

        self.lease, self.base, found = None, None, self._lead(ask)
        self.did, self.seconds, self._since = 0, 0.0, time.monotonic()
        if found is None:
            return
        self.lease, self.base = found
        self.done, at = self.lease is None, 0
        for f in self.parts:
            f.put(self.base[at : at + f.size])
            at += f.size

    def _local(self) -> np.ndarray:
        return np.concatenate([f.get(offload=True).astype("float32") for f in self.parts])

    def _clock(self) -> None:
        now = time.monotonic()
        self.seconds += now - (self._since if self._since is not None else now)
        self._since = now

    # ------------------------------------------------------------------------- watching, memory

    def report(self) -> dict[str, Any]:
        """What a log line says about the outer loop: the lease in hand, the version of θ at the server, how
        many versions the last push was behind, bytes, and all pushes by verdict."""
        beats = self._pulse.traffic if self._pulse else (0, 0)
        link, lease = self._link, self.lease
        sent, received = (link.sent, link.received) if link else (0, 0)
        where = {"shard": lease.shard, "base": lease.base, "lease": lease.id} if lease else {}
        if link is not None:
            seen = {"version": link.version, "staleness": link.staleness}
            where |= {k: v for k, v in seen.items() if v is not None}
        return {**where, "sent": sent + beats[0], "received": received + beats[1], **self.verdicts}

    def tell(self, **report: Any) -> None:
        """What the next beat says about this worker: loss, tokens_per_s."""
        self.loss = report.get("loss", self.loss)
        if self._pulse is not None:
            self._pulse.report = report

    def state_dict(self) -> dict[str, Any]:
        self._clock()
        return {
            "kind": "async",
            "worker": self.worker,
            "lease": vars(self.lease).copy() if self.lease else None,
            "base": layout.saved(self.base),
            "residual": layout.saved(self.sender.residual),
            "did": self.did,
            "seconds": self.seconds,
            "done": self.done,
            "verdicts": dict(self.verdicts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("kind") != "async":
            raise ValueError(f"outer state of {state.get('kind')!r}, not of 'async'")
        self.lease = Lease(**state["lease"]) if state["lease"] else None
        like = np.zeros(0, "float32")
        self.base = layout.restored(state["base"], like)
        self.sender.residual = layout.restored(state["residual"], like)
        self.did, self.seconds = int(state["did"]), float(state["seconds"])
        self.done, self.verdicts = bool(state["done"]), dict(state["verdicts"])
