"""Files that are either whole or absent, and hashes that name the damaged block.

Everything the dataset side writes goes through here: temporary name, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import blake3
import psutil
import xxhash

BLOCK = 16 * 2**20  # bytes under one xxh3-64: what `verify` can name as damaged
TEMPORARY = ".tmp"


class DatasetError(Exception):
    """A user error of the dataset side: where, what was given, what is allowed, what to do."""


def canonical(data: Any) -> bytes:
    """JSON with sorted keys and no spaces: the bytes that hashes are taken of."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(data: bytes) -> str:
    return blake3.blake3(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """Where this process writes what becomes `path`. Process ids repeat between machines and containers, and
    a folder may be shared by several, so the machine's name is in it too."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}{TEMPORARY}")


def abandoned(temporary: Path) -> bool:
    """Whether a temporary file was left by a process of this machine that is gone."""
    start, _, process = temporary.name.removesuffix(TEMPORARY).rpartition(".")
    return start.endswith(f".{platform.node()}") and not psutil.pid_exists(int(process))


@contextlib.contextmanager
def writing(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file that appears under its name only when the block ends without an exception.

    Raises DatasetError when the disk is full or the folder cannot be written.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # a file where a folder should be: nothing was written
            temporary.unlink()


def require_empty(out: Path) -> None:
    """Raises DatasetError unless `out` is an empty folder, or nothing yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: a file, or a folder that is not empty. Choose another --out")


def explain(error: OSError, path: Path | str) -> DatasetError:
    """An operating-system error as a sentence with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DatasetError(
            f"{path}: no space left on the disk. What was finished is kept: free some space and run the "
            "same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DatasetError(f"{path}: not permitted ({error.strerror}). Check the owner and the rights")
    return DatasetError(f"{path}: {error.strerror or error}")


def write_bytes(path: Path, data: bytes) -> None:
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, data: Any) -> None:
    write_bytes(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Raises DatasetError when the file is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise explain(error, path) from error
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON ({error})") from None


class Hasher:
    """blake3 of a whole stream, and xxh3-64 of every BLOCK of it, in one pass."""

    def __init__(self) -> None:
        self.size = 0
        self._whole = blake3.blake3()
        self._block = xxhash.xxh3_64()
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._whole.update(view)
        while len(view):
            room = BLOCK - self.size % BLOCK
            part = view[:room]
            self._block.update(part)
            self.size += len(part)
            view = view[room:]
            if self.size % BLOCK == 0:
                self._blocks.append(self._block.hexdigest())
                self._block = xxhash.xxh3_64()

    def result(self) -> dict[str, Any]:
        """{"bytes", "blake3", "blocks": xxh3-64 of each 16 MiB}."""
        tail = [self._block.hexdigest()] if self.size % BLOCK else []
        return {"bytes": self.size, "blake3": self._whole.hexdigest(), "blocks": self._blocks + tail}


def block_hashes(data: memoryview) -> list[str]:
    """xxh3-64 of each BLOCK of `data`."""
    return [xxhash.xxh3_64_hexdigest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
