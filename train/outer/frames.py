"""Frames on a TCP connection: lengths checked before memory is taken, contents before they are believed.

    header   magic 4 | kind 1 | 3 zero | meta length u32 | body length u64 | number u64    big endian
    meta     JSON object           body   raw bytes           tag   32 bytes

The tag is blake3 of everything before it, keyed with the connection's session key: checksum and
authentication in one. Frames of a connection are numbered in each direction, so none can be left out, sent
twice or moved. There is no pickle. Before a connection is authenticated only small frames are taken.

Handshake, both sides proving that they know the secret without sending it:

    server -> client   hello    nonce_s
    client -> server   prove    nonce_c, HMAC-SHA256(secret, "client" nonce_s nonce_c)
    server -> client   welcome  HMAC-SHA256(secret, "server" nonce_s nonce_c)
    key = HMAC-SHA256(secret, "key" nonce_s nonce_c)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3

from train.errors import UserError

MAGIC = b"LLO1"
HEADER = struct.Struct(">4sB3xIQQ")
TAG = 32
META_LIMIT = 1 << 20
SMALL = 4096  # bytes of a frame before the other side has proved itself
CHUNK = 1 << 20  # bytes handed to the system in one call
KINDS = ("hello", "prove", "welcome", "join", "lease", "push", "ack", "beat", "status", "refuse", "wait")
OPEN_KEY = b"\0" * 32  # of frames before the handshake: a checksum only
VARIABLE = "LATENT_LAB_SECRET"


class FrameError(Exception):
    """Bytes that are no frame of this connection."""


@dataclass(frozen=True)
class Frame:
    kind: str
    meta: dict[str, Any] = field(default_factory=dict)
    body: bytes | bytearray | memoryview = b""


def pack(frame: Frame, key: bytes, number: int) -> list[bytes | memoryview]:
    """The pieces of a frame on the wire; the body is not copied."""
    meta = json.dumps(frame.meta).encode()
    body = memoryview(frame.body).cast("B")
    head = HEADER.pack(MAGIC, KINDS.index(frame.kind), len(meta), len(body), number) + meta
    return [head, body, blake3.blake3(head, key=key).update(body).digest()]


class Reader:
    """Bytes in, frames out; for one direction of one connection.

    limit: bytes of the largest body taken. Raises FrameError, after which the connection must be closed.
    """

    def __init__(self, key: bytes = OPEN_KEY, limit: int = SMALL) -> None:
        self.key, self.limit, self.number = key, limit, 0

    def header(self, head: bytes) -> tuple[str, int, int]:
        """(kind, meta length, body length) of a header that may be believed as far as memory goes."""
        magic, kind, meta, body, number = HEADER.unpack(head)
        if magic != MAGIC:
            raise FrameError(f"not one of our frames (begins with {magic!r})")
        if kind >= len(KINDS) or head[5:8] != b"\0\0\0":
            raise FrameError(f"no frame of kind {kind}")
        if meta > min(META_LIMIT, self.limit) or body > self.limit:
            raise FrameError(f"a frame of {meta} + {body} bytes, at most {self.limit} are taken")
        if number != self.number:
            raise FrameError(f"frame number {number}, expected {self.number}")
        return KINDS[kind], meta, body

    def finish(self, head: bytes, meta: bytes, body: bytearray, tag: bytes) -> Frame:
        want = blake3.blake3(head, key=self.key).update(meta).update(body).digest()
        if not hmac.compare_digest(want, tag):
            raise FrameError("a frame whose tag does not fit its contents")
        try:
            fields = json.loads(meta)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"a frame whose fields are no JSON ({error})") from None
        if not isinstance(fields, dict):
            raise FrameError("a frame whose fields are no JSON object")
        self.number += 1
        return Frame(KINDS[HEADER.unpack(head)[1]], fields, body)

    def read(self, take: Callable[[int], bytearray]) -> Frame:
        """The next frame; take(n) gives exactly n bytes or raises."""
        head = bytes(take(HEADER.size))
        _, meta, body = self.header(head)
        return self.finish(head, bytes(take(meta)), take(body), bytes(take(TAG)))


class Connection:
    """A socket that speaks frames. Counts every byte that it hands to the system, frames and all.

    A timeout of the socket is for a line on which nothing moves, however long a frame takes.
    moved: `time.monotonic()` of the last byte in either direction.
    """

    def __init__(self, sock: socket.socket, limit: int = SMALL) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.reader = sock, Reader(limit=limit)
        self.key, self.number = OPEN_KEY, 0
        self.sent = self.received = 0
        self.moved = time.monotonic()

    def send(self, frame: Frame) -> None:
        for piece in pack(frame, self.key, self.number):
            view = memoryview(piece)
            while view:  # not `sendall`, whose timeout is for the whole
                gone = self.sock.send(view[:CHUNK])
                view = view[gone:]
                self.sent += gone
                self.moved = time.monotonic()
        self.number += 1

    def receive(self) -> Frame:
        return self.reader.read(self._take)

    def _take(self, n: int) -> bytearray:
        out = bytearray(n)
        view = memoryview(out)
        while view:
            got = self.sock.recv_into(view)
            if not got:
                raise ConnectionError("the other side closed the connection")
            view = view[got:]
            self.received += got
            self.moved = time.monotonic()
        return out

    def close(self) -> None:
        self.sock.close()

    def _keyed(self, key: bytes, limit: int) -> None:
        self.key = self.reader.key = key
        self.reader.limit = limit

    def accept(self, secret: bytes, limit: int) -> None:
        """The server's side of the handshake. Raises FrameError for a client without the secret."""
        ours = os.urandom(32)
        self.send(Frame("hello", {"nonce": ours.hex()}))
        answer = self.receive()
        theirs, proof = _hex(answer, "nonce"), _hex(answer, "proof")
        if answer.kind != "prove" or not hmac.compare_digest(proof, _mac(secret, b"client", ours, theirs)):
            self.send(Frame("refuse", {"why": "wrong secret"}))
            raise FrameError("wrong secret")
        self.send(Frame("welcome", {"proof": _mac(secret, b"server", ours, theirs).hex()}))
        self._keyed(_mac(secret, b"key", ours, theirs), limit)

    def greet(self, secret: bytes, limit: int) -> None:
        """The client's side. Raises UserError when the two secrets differ, FrameError for another service."""
        hello, ours = self.receive(), os.urandom(32)
        theirs = _hex(hello, "nonce")
        proof = _mac(secret, b"client", theirs, ours).hex()
        self.send(Frame("prove", {"nonce": ours.hex(), "proof": proof}))
        answer = self.receive()
        proved = answer.kind == "welcome" and hmac.compare_digest(
            _hex(answer, "proof"), _mac(secret, b"server", theirs, ours)
        )
        if not proved:
            raise UserError(f"the server has another secret than this side (secret file, ${VARIABLE})")
        self._keyed(_mac(secret, b"key", theirs, ours), limit)


def _mac(secret: bytes, what: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.new(secret, what + server + client, hashlib.sha256).digest()


def _hex(frame: Frame, key: str) -> bytes:
    value = frame.meta.get(key, "")
    try:
        return bytes.fromhex(value)
    except (TypeError, ValueError):
        raise FrameError(f"a {frame.kind} frame without {key}") from None


def secret_of(file: str | None) -> bytes:
    """The shared secret: of a file that only its owner can read, or of the environment. Raises UserError."""
    if file is not None:
        path = Path(file)
        try:
            mode, text = path.stat().st_mode, path.read_bytes().strip()
        except OSError as error:
            raise UserError(f"{file}: the secret cannot be read ({error.strerror})") from None
        if os.name != "nt" and mode & 0o077:
            raise UserError(f"{file}: others may read this secret; chmod 600 {file}")
    else:
        text = os.environ.get(VARIABLE, "").encode()
    if len(text) < 16:
        raise UserError(
            f"a secret of at least 16 characters is needed, in ${VARIABLE} or in a file (--secret-file of "
            f"the server, outer.secret_file of a worker); make one with\n"
            f"  python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return text


def address_of(text: str) -> tuple[str, int]:
    """HOST:PORT, [V6]:PORT. Raises UserError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 65536):
        raise UserError(f"{text!r}: want HOST:PORT, like 192.168.1.10:29500")
    return host.strip("[]"), int(port)
