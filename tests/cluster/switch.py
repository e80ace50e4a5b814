"""A learning Ethernet switch in user space, with a rate, a delay and a loss of its own on every cable.

    python switch.py FOLDER RATE_MBIT DELAY_MS LOSS_PERCENT PORT...

Makes a TAP device for every port in the network namespace where it runs, writes FOLDER/ready, and forwards.
A port whose FOLDER/cut.PORT exists is unplugged: frames in both directions vanish, nobody is told. Many
kernels have no netem; this needs only /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from pathlib import Path

TUNSETIFF, TAP_NO_INFO = 0x400454CA, 0x1002
OVERHEAD = 24  # preamble, checksum and gap of an Ethernet frame on the wire
QUEUE_S = 0.1  # frames beyond this much waiting are dropped


class Cable:
    """One port: its device, and when each direction is free again."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._cut = name, folder / f"cut.{name}"
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22s", name.encode(), TAP_NO_INFO, b""))
        self.free = {"up": 0.0, "down": 0.0}
        self.cut = False

    def look(self) -> None:
        self.cut = self._cut.exists()

    def book(self, way: str, now: float, size: int, rate: float) -> float | None:
        """When the last bit of a frame is through; None when the queue is full."""
        if not rate:
            return now
        start = max(self.free[way], now)
        if start - now > QUEUE_S:
            return None
        self.free[way] = start + (size + OVERHEAD) * 8 / rate
        return self.free[way]


def forward(folder: Path, rate: float, delay: float, loss: float, names: list[str]) -> None:
    cables = {c.fd: c for c in (Cable(n, folder) for n in names)}
    table: dict[bytes, Cable] = {}
    waiting: list[tuple[float, int, int, bytes]] = []
    poll, count, looked = select.poll(), 0, 0.0
    for fd in cables:
        poll.register(fd, select.POLLIN)
    (folder / "ready").touch()
    while True:
        now = time.monotonic()
        if now - looked > 0.02:
            for cable in cables.values():
                cable.look()
            looked = now
        while waiting and waiting[0][0] <= now:
            _, _, fd, frame = heapq.heappop(waiting)
            if not cables[fd].cut:
                try:
                    os.write(fd, frame)
                except OSError:
                    continue  # nobody at the other end
        pause = 20.0 if not waiting else max(0.0, min(20.0, (waiting[0][0] - time.monotonic()) * 1e3))
        for fd, _ in poll.poll(pause):
            for _ in range(64):
                try:
                    frame = os.read(fd, 65535)
                except OSError:
                    break
                if cables[fd].cut or (loss and random.random() < loss):
                    continue
                table[frame[6:12]] = cables[fd]
                through = cables[fd].book("up", time.monotonic(), len(frame), rate)
                if through is None:
                    continue
                known = table.get(frame[:6])
                for out in [known] if known else [c for c in cables.values() if c.fd != fd]:
                    at = out.book("down", through, len(frame), rate)
                    if at is not None:
                        count += 1
                        heapq.heappush(waiting, (at + delay, count, out.fd, frame))


if __name__ == "__main__":
    where, mbit, ms, percent, *ports = sys.argv[1:]
    forward(Path(where), float(mbit) * 1e6, float(ms) / 1e3, float(percent) / 100, ports)
