"""What the server remembers on disk: a snapshot, and every event since, so that kill -9 loses nothing.

    DIR/snapshot_00000012.safetensors    arrays of the coordinator; its JSON values are the file's metadata
    DIR/journal_00000012                 events after that snapshot, each forced to the disk before it is
                                         answered

    event:  length of meta u32 | length of body u64 | meta JSON | body | blake3 16

A restart loads the newest whole snapshot and applies its journal again; a last event that was cut off was
never answered, so its worker sends it again. An event that cannot be written leaves nothing behind, for
what comes after a cut would not be read. Snapshots are written aside, forced to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import blake3
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dataset.files import write_bytes
from train.errors import UserError

HEAD = struct.Struct(">IQ")
CHECK = 16
LARGE = 64 << 20  # bytes of journal that may always gather; beyond, a few times the snapshot's own
TIMES = 8
NAME = re.compile(r"snapshot_(\d{8})\.safetensors")


class Journal:
    """The folder of one server; one server at a time. Raises UserError when it is in use."""

    def __init__(self, folder: Path, every: int = 200) -> None:
        self.folder, self.every = folder, every
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another server works here; give another folder with --dir") from None
        self._file: IO[bytes] | None = None
        self.events = 0
        self.number = -1

    def recover(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """The newest whole snapshot, or None in a new folder. Raises UserError when none is whole."""
        found = [int(m[1]) for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name))]
        for number in sorted(found, reverse=True):
            try:
                with safe_open(self._snapshot(number), "numpy") as file:
                    rest = json.loads(file.metadata()["state"])
                    arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            except (SafetensorError, KeyError, ValueError, OSError):
                continue
            self.number = number
            return rest, arrays
        if found:
            raise UserError(f"{self.folder}: none of its {len(found)} snapshots can be read")
        return None

    def replay(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Events after the snapshot; the file is then open, cut behind the last whole one."""
        path = self._events(self.number)
        path.touch()
        size, at = path.stat().st_size, 0
        with open(path, "rb") as file:
            while at + HEAD.size <= size:
                head = file.read(HEAD.size)
                meta, body = HEAD.unpack(head)
                end = at + HEAD.size + meta + body + CHECK
                if end > size:
                    break
                text, content = file.read(meta), file.read(body)
                if file.read(CHECK) != blake3.blake3(head).update(text).update(content).digest(CHECK):
                    break
                yield json.loads(text), content
                at = end
                self.events += 1
        self._open(at)

    def append(self, meta: dict[str, Any], body: bytes | memoryview = b"") -> None:
        """Force one event to the disk; all of it, or nothing and the OSError."""
        assert self._file is not None
        at = self._file.tell()
        text, body = json.dumps(meta).encode(), memoryview(body).cast("B")
        head = HEAD.pack(len(text), len(body)) + text
        check = blake3.blake3(head).update(body).digest(CHECK)
        try:
            for piece in (head, body, check):
                self._file.write(piece)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()  # what is left in its buffer must not be written later
            self._open(at)
            raise
        self.events += 1

    def _open(self, at: int) -> None:
        """The journal, cut to its first `at` bytes."""
        path = self._events(self.number)
        os.truncate(path, at)
        self._file = open(path, "ab")  # noqa: SIM115

    def snapshot(self, state: Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]]) -> None:
        """Begin a new generation; the one before stays until the next. If it fails, the old one goes on."""
        rest, arrays = state()
        arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        new = self.number + 1
        events = open(self._events(new), "wb")  # noqa: SIM115
        try:
            write_bytes(self._snapshot(new), save(arrays, {"state": json.dumps(rest)}))
        except Exception:
            events.close()
            self._snapshot(new).unlink(missing_ok=True)  # it would hide what the old journal still gets
            raise
        if self._file is not None:
            self._file.close()
        self._file, self.number, self.events = events, new, 0
        for old in range(max(0, self.number - 3), self.number - 1):
            self._snapshot(old).unlink(missing_ok=True)
            self._events(old).unlink(missing_ok=True)

    def full(self) -> bool:
        """Whether it is time for a snapshot: `every` events, or more bytes than a restart should read."""
        assert self._file is not None
        large = max(LARGE, TIMES * self._snapshot(self.number).stat().st_size)
        return self.events >= self.every or self._file.tell() > large

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def _snapshot(self, number: int) -> Path:
        return self.folder / f"snapshot_{number:08d}.safetensors"

    def _events(self, number: int) -> Path:
        return self.folder / f"journal_{number:08d}"
