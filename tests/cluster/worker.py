"""A light worker on the real client: logistic regression in numpy, so that it starts in a second.

    python -m tests.cluster.worker SERVER NAME STEPS SHARDS EVERY PACE_S SEED [FAULT]

FAULT: `send:N`, the N-th push is sent half and the process kills itself with SIGKILL; `receive:N`, the same
in the middle of the N-th θ it receives. Prints the held-out loss of the final θ as its last line.

Shape legend: D inputs  C classes  B rows.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from train.outer import codec as codecs
from train.outer.client import Link, Pulse
from train.outer.codec import Sender
from train.outer.coordinator import Terms
from train.outer.frames import Connection, Frame, pack, secret_of

D, C, B = 200, 50, 64  # 10,000 weights, 40 kB in fp32
LR = 0.3
HEARTBEAT = 1.0


def teacher() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((D, C)).astype("float32") / D**0.5


def rows(seed: int, shard: int, step: int, n: int = B) -> tuple[np.ndarray, np.ndarray]:
    """x [n, D] and the classes [n] that a noisy teacher gives it."""
    rng = np.random.default_rng((seed, shard, step))
    x = rng.standard_normal((n, D)).astype("float32")
    return x, (4 * x @ teacher() + rng.gumbel(size=(n, C))).argmax(1)


def gradient(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    z = x @ theta.reshape(D, C)
    z -= z.max(1, keepdims=True)
    p = np.exp(z)
    p /= p.sum(1, keepdims=True)
    loss = -float(np.log(p[np.arange(len(y)), y] + 1e-9).mean())
    p[np.arange(len(y)), y] -= 1
    return loss, (x.T @ p / len(y)).reshape(-1)


def held_out(theta: np.ndarray) -> float:
    return gradient(theta, *rows(0, 10_000, 0, 4096))[0]


def terms(steps: int, shards: int, every: int) -> Terms:
    return Terms(
        D * C, steps, D * C, every=every, shards=shards, codec="fp32", heartbeat=HEARTBEAT, stale=1000
    )


def arm(fault: str) -> None:
    """Make this process kill itself in the middle of a message."""
    what, _, count = fault.partition(":")
    left = int(count)
    if what == "send":
        whole = Connection.send

        def half(self: Connection, frame: Frame) -> None:
            nonlocal left
            if frame.kind == "push":
                left -= 1
                if not left:
                    data = b"".join(pack(frame, self.key, self.number))
                    self.sock.sendall(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            whole(self, frame)

        Connection.send = half  # type: ignore[method-assign]
        return
    take = Connection._take

    def part(self: Connection, n: int) -> bytearray:
        nonlocal left
        if n >= 4 * D * C:
            left -= 1
            if not left:
                take(self, n // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return take(self, n)

    Connection._take = part  # type: ignore[method-assign]


def main(server: str, name: str, steps: int, shards: int, every: int, pace: float, seed: int) -> None:
    agreed = terms(steps, shards, every)
    link = Link(server, secret_of(None), name, patience=60)
    link.join(agreed, {"plan": "numpy", "seed": str(seed)}, np.zeros(D * C, "float32"))
    pulse = Pulse(server, secret_of(None), name, HEARTBEAT / 3)
    sender = Sender(codecs.make(agreed.codec), agreed.n)
    while True:
        lease, theta = link.lease()
        if lease is None:
            break
        base, began, loss = theta.copy(), time.monotonic(), 0.0
        for i in range(lease.steps):
            loss, g = gradient(theta, *rows(seed, lease.shard, lease.first + i))
            theta -= LR * g
            time.sleep(pace)
        link.push(lease.id, time.monotonic() - began, sender.encode(base - theta), {"loss": loss})
    pulse.close()
    sent, received = link.sent + pulse.traffic[0], link.received + pulse.traffic[1]
    print(f"sent {sent} received {received} loss {held_out(theta)}", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) > 7:
        arm(words[7])
    main(words[0], words[1], *map(int, words[2:5]), float(words[5]), int(words[6]))  # type: ignore[call-arg]
