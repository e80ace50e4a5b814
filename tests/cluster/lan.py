"""A throw-away LAN of network namespaces behind `switch.py`: nodes n0, n1, ... with addresses 10.99.0.10+i.

Nothing is attached to the machine's own network and no route leads out. Needs root, ip, and /dev/net/tun.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

HEADERS = 14 + 20 + 32  # Ethernet, IPv4, TCP with time stamps
SWITCH = Path(__file__).with_name("switch.py")


def missing() -> str | None:
    """Why there can be no LAN on this machine, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "needs iproute2's ip"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    probe = f"labprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return None


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Lan:
    """mbit 0: as fast as it goes; delay in ms one way; loss in percent."""

    def __init__(
        self, nodes: int, folder: Path, mbit: float = 100, delay: float = 5, loss: float = 0
    ) -> None:
        self.folder, self.size = folder, nodes
        self.prefix = f"lab{os.getpid() % 100000}"
        self.processes: list[subprocess.Popen[Any]] = []
        self._made: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._build(mbit, delay, loss)
        except BaseException:
            self.close()
            raise

    def _build(self, mbit: float, delay: float, loss: float) -> None:
        for name in ("sw", *self.nodes):
            run("ip", "netns", "add", self._ns(name))
            self._made.append(self._ns(name))
        settings = [str(self.folder), str(mbit), str(delay), str(loss), *self.nodes]
        self.switch = self.popen("sw", [sys.executable, str(SWITCH), *settings])
        end = time.monotonic() + 120
        while not (self.folder / "ready").exists():
            if time.monotonic() > end or self.switch.poll() is not None:
                raise RuntimeError("the switch did not start")
            time.sleep(0.05)
        for i, name in enumerate(self.nodes):
            ns = self._ns(name)
            run("ip", "-n", self._ns("sw"), "link", "set", name, "netns", ns)
            run("ip", "-n", ns, "link", "set", name, "name", "eth0")
            run("ip", "-n", ns, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            run("ip", "-n", ns, "link", "set", "lo", "up")
            run("ip", "-n", ns, "link", "set", "eth0", "up")

    @property
    def nodes(self) -> list[str]:
        return [f"n{i}" for i in range(self.size)]

    def address(self, node: int) -> str:
        return f"10.99.0.{10 + node}"

    def popen(self, node: str, words: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on a node; `ip netns exec` becomes it, so its pid is the program's."""
        process = subprocess.Popen(["ip", "netns", "exec", self._ns(node), *words], **options)
        self.processes.append(process)
        return process

    def reaches(self, node: str, where: str) -> bool:
        """Whether a TCP connection from the node to HOST:PORT is made within 5 s."""
        host, port = where.rsplit(":", 1)
        code = f"import socket; socket.create_connection(({host!r}, {port}), 5)"
        process = self.popen(node, [sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        return process.wait(60) == 0

    def cut(self, node: str) -> None:
        """Unplug: frames vanish, no connection is told."""
        (self.folder / f"cut.{node}").touch()

    def heal(self, node: str) -> None:
        (self.folder / f"cut.{node}").unlink(missing_ok=True)

    def counters(self, node: str) -> tuple[int, int]:
        """Bytes (sent, received) that the node's interface counts, less 66 of headers in every TCP packet."""
        (link,) = json.loads(run("ip", "-n", self._ns(node), "-s", "-j", "link", "show", "eth0"))
        sent, received = (link["stats64"][way] for way in ("tx", "rx"))
        return tuple(w["bytes"] - HEADERS * w["packets"] for w in (sent, received))  # type: ignore[return-value]

    def _ns(self, node: str) -> str:
        return f"{self.prefix}-{node}"

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
