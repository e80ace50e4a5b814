"""Round trip, clock offset and bandwidth between two nodes, and what they mean for an outer loop.

    probe.py serve HOST:PORT --secret-file FILE [--visitors N]    answer N times
    probe.py measure HOST:PORT... --secret-file FILE              a line of JSON for each
    probe.py port HOST:PORT                                       `free` or `in use`
    probe.py advise --mbit X --parameters N --step-s S [--share 0.1]

Python's standard library alone. The other side proves the secret by HMAC-SHA256 before anything is measured.
The secret comes from a file: Ansible writes the words and the stdin of a command into the node's system log.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import hmac
import json
import math
import os
import socket
import struct
import sys
import time
from pathlib import Path

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.016, "e3m0": 0.516}  # a value, as in train/outer/README.md
CHUNK = bytes(2**16)
SECONDS = 2.0  # of sending
LONGEST_H = 100


def secret_of(file: str) -> bytes:
    """Raises OSError when it cannot be read, ValueError when it is too short."""
    key = Path(file).read_bytes().strip()
    if len(key) < 16:
        raise ValueError(f"{file}: want a secret of at least 16 characters, not {len(key)}; run setup.yml")
    return key


def take(sock: socket.socket, n: int) -> bytes:
    out = b""
    while len(out) < n:
        part = sock.recv(n - len(out))
        if not part:
            raise ConnectionError("the other side hung up")
        out += part
    return out


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def answer(sock: socket.socket, key: bytes) -> None:
    """One visitor: challenge, eight clock readings, then count what arrives."""
    challenge = os.urandom(32)
    sock.sendall(challenge)
    if not hmac.compare_digest(take(sock, 32), hmac.digest(key, challenge, hashlib.sha256)):
        return
    for _ in range(8):
        take(sock, 1)
        sock.sendall(struct.pack("<d", time.time()))
    count, began = 0, time.monotonic()
    while part := sock.recv(2**16):
        count += len(part)
    sock.sendall(struct.pack("<dd", count, time.monotonic() - began))


def serve(where: str, visitors: int, seconds: float, key: bytes) -> int:
    end = time.monotonic() + seconds
    with socket.create_server(address(where)) as server:
        for _ in range(visitors):
            server.settimeout(max(0.1, end - time.monotonic()))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                break
            with sock, contextlib.suppress(OSError):
                sock.settimeout(15)
                answer(sock, key)
    return 0


def port(where: str) -> int:
    try:
        socket.create_server(address(where)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            print(f"error: {where}: {error}", file=sys.stderr)
            return 2
        print("in use")
        return 0
    print("free")
    return 0


def clock(sock: socket.socket) -> tuple[float, float]:
    """Seconds of one round trip, and their clock less ours."""
    began, ours = time.monotonic(), time.time()
    sock.sendall(b"?")
    (theirs,) = struct.unpack("<d", take(sock, 8))
    rtt = time.monotonic() - began
    return rtt, theirs - ours - rtt / 2


def measure(where: str, key: bytes, patience: float = 30.0) -> dict[str, float]:
    """rtt_ms (least of 8), skew_s (their clock less ours), mbit (received there). Raises OSError."""
    end = time.monotonic() + patience
    while True:
        try:
            sock = socket.create_connection(address(where), timeout=5)
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
    with sock:
        sock.settimeout(30)
        sock.sendall(hmac.digest(key, take(sock, 32), hashlib.sha256))
        try:
            best = min(clock(sock) for _ in range(8))
        except ConnectionError as error:
            raise ConnectionError(f"{error}; it may have another secret (run setup.yml)") from None
        stop = time.monotonic() + SECONDS
        while time.monotonic() < stop:
            sock.sendall(CHUNK)
        sock.shutdown(socket.SHUT_WR)
        count, seconds = struct.unpack("<dd", take(sock, 16))
    return {
        "rtt_ms": round(best[0] * 1e3, 2),
        "skew_s": round(best[1], 3),
        "mbit": round(count * 8e-6 / seconds, 1),
    }


def advise(mbit: float, parameters: float, step_s: float, share: float = 0.1) -> dict[str, object]:
    """The most exact codec, and the least H, at which up and down take at most `share` of a round.

    H >= 2 * 8 * bytes * parameters / (mbit * 1e6 * step_s * share)
    """
    table = {
        codec: max(1, math.ceil(2 * 8 * size * parameters / (mbit * 1e6 * step_s * share)))
        for codec, size in BYTES.items()
    }
    codec = next((c for c, h in table.items() if h <= LONGEST_H), "e3m0")
    return {"codec": codec, "every": table[codec], "table": table}


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="probe.py", description="Bandwidth between two nodes.")
    actions = p.add_subparsers(dest="action", required=True)
    one = actions.add_parser("serve")
    one.add_argument("where", metavar="HOST:PORT")
    one.add_argument("--visitors", type=int, default=1)
    one.add_argument("--seconds", type=float, default=60.0, help="at most so long")
    one.add_argument("--secret-file", required=True, metavar="FILE")
    actions.add_parser("port").add_argument("where", metavar="HOST:PORT")
    one = actions.add_parser("measure")
    one.add_argument("where", nargs="+", metavar="HOST:PORT")
    one.add_argument("--secret-file", required=True, metavar="FILE")
    one = actions.add_parser("advise")
    for name in ("--mbit", "--parameters", "--step-s"):
        one.add_argument(name, type=float, required=True)
    one.add_argument("--share", type=float, default=0.1)
    args = p.parse_args(argv)
    if args.action == "advise":
        print(json.dumps(advise(args.mbit, args.parameters, args.step_s, args.share)))
        return 0
    if args.action == "port":
        return port(args.where)
    try:
        key = secret_of(args.secret_file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.action == "serve":
        return serve(args.where, args.visitors, args.seconds, key)
    for where in args.where:
        try:
            print(json.dumps(measure(where, key)))
        except OSError as error:
            print(f"error: {where}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
