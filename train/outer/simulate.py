"""A virtual clock over the same coordinator: asynchronous training of k workers in one process.

Shape legend: N values of θ.

Workers take a given time a step; events happen in the order of that clock, so a run is reproducible and
says what unequal machines would do, without the machines. For science and for tests.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from train.outer.codec import Sender
from train.outer.coordinator import Coordinator, Lease

Train = Callable[[str, np.ndarray, Lease], np.ndarray]  # (worker, θ, lease) -> θ after the lease's steps


@dataclass(frozen=True)
class Result:
    """seconds: virtual time until every shard had its steps; sent and received: bytes of all workers."""

    seconds: float
    pushes: int
    sent: int
    received: int


def simulate(
    coordinator: Coordinator,
    paces: dict[str, float],
    train: Train,
    link: float = 0.0,
    feedback: bool = True,
    watch: Callable[[float, Coordinator], None] | None = None,
) -> Result:
    """Run until every shard has had its steps.

    paces: seconds a step of every worker.    link: bytes/s between a worker and the server (0: no delay).
    watch: called with the time after every push.
    """
    c, t = coordinator, coordinator.terms
    senders = {name: Sender(c.codec, t.n, feedback) for name in paces}
    heap: list[tuple[float, int, str, Lease, float]] = []
    started: set[int] = set()
    size, down = c.codec.size(t.n), 4 * t.n
    wire = (lambda n: n / link) if link else (lambda n: 0.0)
    bases: dict[int, np.ndarray] = {}
    pushes = sent = received = 0

    def start(now: float) -> None:
        nonlocal received
        for name in paces:
            lease = c.lease_of(name)
            if lease is not None and lease.id not in started:
                started.add(lease.id)
                bases[lease.id] = c.theta
                received += down
                work = lease.steps * paces[name]
                heapq.heappush(heap, (now + wire(down) + work + wire(size), lease.id, name, lease, work))

    for name in paces:
        c.join(name, 0.0)
    start(0.0)
    now = 0.0
    while heap:
        due = c.due()
        if due is not None and due < heap[0][0]:
            now = max(now, due)
            c.close(now)
            start(now)
            continue
        now, _, name, lease, work = heapq.heappop(heap)
        base = bases.pop(lease.id)
        before = senders[name].residual
        code = senders[name].encode(base - train(name, base.copy(), lease))
        if c.push(name, lease.id, work, code, now) != "applied":
            senders[name].residual = before
        pushes, sent = pushes + 1, sent + size
        start(now)
        if watch:
            watch(now, c)
    return Result(now, pushes, sent, received)
