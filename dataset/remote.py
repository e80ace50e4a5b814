"""Datasets behind a URL: `dataset.open("s3://bucket/corpus")`, any fsspec file system.

Manifest, tokenizer and source list are copied once. Shards are copied when an id of theirs is read, into a
local cache of at most `limit` bytes: the least recently used go first. A copied file appears under its name
whole and with the hash of the manifest, or not at all; one from an earlier run is hashed again before it is
used, and fetched anew if it has changed.

    LATENT_LAB_CACHE         the cache's folder (default ~/.cache/latent-lab/datasets)
    LATENT_LAB_CACHE_BYTES   its limit per dataset (default 64 GiB)
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import TEMPORARY, DatasetError, Hasher, abandoned, block_hashes, digest, explain, writing
from dataset.format import KINDS, Dataset, Shard, check_tokenizer, map_file, read_manifest

LIMIT = 64 * 2**30
PIECE = 8 * 2**20


def as_url(path: str | os.PathLike) -> str | None:
    """The URL that a path stands for, or None. `Path("s3://a/b")`, as a command line makes it,
    has lost a slash."""
    text = os.fspath(path)
    if "://" in text:
        return text
    lost = re.fullmatch(r"([a-z][a-z0-9+.-]+):/([^/].*)", text)
    if lost is None:
        return None
    return f"file:///{lost[2]}" if lost[1] == "file" else f"{lost[1]}://{lost[2]}"


class Remote:
    """A folder behind a URL. Errors of the file system become DatasetErrors that name it."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # each file system raises its own; its package may be missing
            raise DatasetError(f"{url}: cannot be opened: {type(error).__name__}: {error}") from error

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by path relative to it."""
        top = f"{self.root}/{folder}".rstrip("/")
        try:
            found = self.system.find(top, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise DatasetError(f"{self.url}/{folder}: {type(error).__name__}: {error}") from error
        return {path[len(top) :].lstrip("/"): int(info["size"]) for path, info in found.items()}

    def copy(self, name: str, to: Path, wanted: dict[str, Any] | None = None) -> None:
        """Copy a file whole. Raises DatasetError, also when size or hash are not the wanted ones; then `to`
        is as it was."""
        hasher = Hasher()
        with writing(to) as file:
            try:
                with self.system.open(f"{self.root}/{name}", "rb") as source:
                    while piece := source.read(PIECE):
                        hasher.update(piece)
                        file.write(piece)
            except FileNotFoundError:
                raise DatasetError(f"{self.url}/{name}: missing. Copy the dataset there again") from None
            except OSError as error:
                raise explain(error, f"{self.url}/{name}") from error
            found = hasher.result()
            if wanted is not None and any(found[key] != wanted[key] for key in ("bytes", "blake3")):
                raise DatasetError(
                    f"{self.url}/{name}: {found['bytes']:,} bytes with another hash than the manifest's "
                    f"({wanted['bytes']:,} bytes). The file there is damaged: copy the dataset there again"
                )


class ShardCache:
    """Local copies of shard files, at most `limit` bytes of them, mapped while they are in use.

    A map that somebody still reads outlives its file; its space is free when the last reader lets go.
    """

    def __init__(self, remote: Remote, folder: Path, limit: int) -> None:
        self.remote, self.folder, self.limit = remote, folder, limit
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{TEMPORARY}"):  # what a killed run left half written
            if abandoned(path):
                path.unlink(missing_ok=True)

    def array(self, name: str, record: dict[str, Any], dtype: np.dtype) -> np.ndarray:
        """The file's values, fetched if need be. Raises DatasetError."""
        with self._lock:
            if name in self._maps:
                self._maps.move_to_end(name)
                return self._maps[name]
            path = self.folder / name
            if not (path.is_file() and self._sound(path, record)):
                self._fetch(path, record)
            made = self._maps[name] = map_file(path, dtype)
            with contextlib.suppress(FileNotFoundError):  # another process made room; the map is whole
                os.utime(path)
            return made

    def _sound(self, path: Path, record: dict[str, Any]) -> bool:
        if path.stat().st_size != record["bytes"]:
            return False
        return block_hashes(map_file(path, np.dtype("u1"), in_order=True).data) == record["blocks"]

    def _fetch(self, path: Path, record: dict[str, Any]) -> None:
        self._make_room(record["bytes"], path)
        self.remote.copy(f"shards/{path.name}", path, record)

    def _make_room(self, wanted: int, keep: Path) -> None:
        """Forget least recently used files until `wanted` more bytes fit."""
        if wanted > self.limit:
            raise DatasetError(
                f"{keep.name}: {wanted:,} bytes, and the cache in {self.folder} may hold {self.limit:,}. "
                "Raise LATENT_LAB_CACHE_BYTES, or write smaller shards (prepare --shard-bytes)"
            )
        entries = []
        for path in self.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room too
                continue
            if path != keep and path.suffix != TEMPORARY:
                entries.append((stat.st_mtime_ns, path, stat.st_size))
        order = {name: i for i, name in enumerate(self._maps)}  # what this run has used goes last, in order
        entries.sort(key=lambda e: (order.get(e[1].name, -1), e[0]))
        used = sum(size for _, _, size in entries)
        for _, path, size in entries:
            if used + wanted <= self.limit:
                return
            self._maps.pop(path.name, None)
            path.unlink(missing_ok=True)
            used -= size


class RemoteShard(Shard):
    """A shard whose files are fetched when they are touched."""

    def __init__(self, cache: ShardCache, folder: Path, entry: dict[str, Any], dtype: str) -> None:
        super().__init__(folder, entry, dtype)
        self.cache = cache

    tok = property(lambda self: self.array("tok"))
    end = property(lambda self: self.array("end"))
    len = property(lambda self: self.array("len"))
    msk = property(lambda self: self.array("msk"))

    def array(self, kind: str) -> np.ndarray:
        """A file's values, mapped from the cache: asked for again at every use, as it may be evicted."""
        dtype = self.dtype if kind == "tok" else KINDS[kind]
        return self.cache.array(f"{self.name}.{kind}", self.entry["files"][kind], dtype)

    def check_sizes(self) -> None:
        """Nothing: `open_remote` has compared the listing."""

    def damage(self):
        """Fetches every file, which compares its hash; one sentence for each that differs."""
        for kind in self.entry["files"]:
            try:
                self.array(kind)
            except DatasetError as error:
                yield str(error)


def _limit() -> int:
    text = os.environ.get("LATENT_LAB_CACHE_BYTES", str(LIMIT))
    if not text.isdecimal():
        raise DatasetError(
            f"LATENT_LAB_CACHE_BYTES={text!r}: a whole number of bytes is needed, such as {LIMIT}"
        )
    return int(text)


def open_remote(
    url: str, check: str = "auto", cache: Path | None = None, limit: int | None = None
) -> Dataset:
    """Open a dataset behind a URL; see `dataset.format.open_dataset`.

    check: "sizes" and "auto" compare the listing with the manifest; "full" fetches and hashes everything.
    Raises DatasetError for a missing or cut shard, a damaged or edited manifest, another tokenizer.
    """
    remote = Remote(url)
    top = cache or Path(os.environ.get("LATENT_LAB_CACHE", "~/.cache/latent-lab/datasets")).expanduser()
    limit = _limit() if limit is None else limit
    if "manifest.json" not in remote.sizes(""):
        raise DatasetError(f"{url}: no dataset here (no manifest.json). Copy a prepared dataset there whole")
    folder = top / digest(remote.url.encode())[:16]
    remote.copy("manifest.json", folder / "manifest.json")
    manifest = read_manifest(folder)
    for name in ("sources.jsonl", *(f"tokenizer/{n}" for n in manifest["tokenizer"]["files"])):
        remote.copy(name, folder / name)
    check_tokenizer(folder, manifest)
    shards = ShardCache(remote, folder / "shards", limit)

    def shard(entry: dict[str, Any]) -> RemoteShard:
        return RemoteShard(shards, folder, entry, manifest["dtype"])

    data = Dataset(folder, manifest, shard)
    there = remote.sizes("shards")
    for part in (s for split in data.splits.values() for s in split.shards):
        for kind, record in part.entry["files"].items():
            size = there.get(f"{part.name}.{kind}")
            if size != record["bytes"]:
                what = "missing" if size is None else f"{size:,} bytes, the manifest says {record['bytes']:,}"
                raise DatasetError(f"{url}/shards/{part.name}.{kind}: {what}. Copy the dataset there again")
        if check == "full":
            for sentence in part.damage():
                raise DatasetError(sentence)
    return data
