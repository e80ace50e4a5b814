"""Writing shards: ids stream to disk and are hashed on the way; a shard is cut at a document's end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import DatasetError, Hasher, explain, sync_folder, temporary_name
from dataset.format import DTYPES, KINDS

SHARD_BYTES = 2**30  # of .tok
MOST_IDS = 2**32 - 1  # of a shard: `.end` is u32
BUFFER_DOCUMENTS, BUFFER_IDS = 4096, 2**22  # kept in memory at most: of short documents, of long ones


class ShardWriter:
    """Writes the documents of one split of one task as `STEM-PART.{tok,len,end[,msk]}`.

    `close` gives the manifest entries. Files carry temporary names until they are whole.
    """

    def __init__(
        self, folder: Path, stem: str, dtype: str, shard_bytes: int = SHARD_BYTES, masks: bool = False
    ) -> None:
        self._folder, self._stem, self._dtype = folder, stem, DTYPES[dtype]
        self._limit = min(shard_bytes // self._dtype.itemsize, MOST_IDS)
        self._kinds = ["tok", "msk"] if masks else ["tok"]
        self.entries: list[dict[str, Any]] = []
        self._start()

    def _start(self) -> None:
        self._files: dict[str, tuple[Any, Hasher]] = {}
        self._pending: dict[str, list[np.ndarray]] = {kind: [] for kind in self._kinds}
        self._lengths: list[int] = []
        self._tokens = self._text_bytes = self._waiting = 0

    @property
    def _name(self) -> str:
        return f"{self._stem}-{len(self.entries):03d}"

    def add(self, ids: np.ndarray, text_bytes: int, mask: np.ndarray | None = None) -> None:
        """One document with its EOS; the array is kept. mask: u8, 1:1 with ids, of a writer with masks.

        Raises DatasetError for a document too long for any shard.
        """
        if len(ids) > MOST_IDS:
            raise DatasetError(
                f"{self._folder / self._name}: a document of {len(ids):,} ids; a shard holds {MOST_IDS:,}. A "
                "text file is one document: cut it, or write its parts as lines of a .jsonl"
            )
        if self._lengths and self._tokens + len(ids) > self._limit:
            self._finish()
        self._pending["tok"].append(ids.astype(self._dtype, copy=False))
        if "msk" in self._kinds:
            self._pending["msk"].append(
                np.ones(len(ids), np.uint8) if mask is None else mask.astype(np.uint8)
            )
        self._lengths.append(len(ids))
        self._tokens += len(ids)
        self._text_bytes += text_bytes
        self._waiting += len(ids)
        if len(self._pending["tok"]) >= BUFFER_DOCUMENTS or self._waiting >= BUFFER_IDS:
            self._flush()

    def _temporary(self, kind: str) -> Path:
        return temporary_name(self._folder / f"{self._name}.{kind}")

    def _write(self, kind: str, data: np.ndarray) -> None:
        path = self._temporary(kind)
        try:
            if kind not in self._files:
                self._files[kind] = (open(path, "wb"), Hasher())  # noqa: SIM115 - closed in _finish, abort
            file, hasher = self._files[kind]
            hasher.update(data.data)
            file.write(data.data)
        except OSError as error:
            raise explain(error, path) from error

    def _flush(self) -> None:
        for kind, parts in self._pending.items():
            if parts:
                self._write(kind, np.concatenate(parts))
                parts.clear()
        self._waiting = 0

    def _finish(self) -> None:
        self._flush()
        lengths = np.array(self._lengths, KINDS["len"])
        self._write("len", lengths)
        self._write("end", np.cumsum(lengths, dtype=KINDS["end"]))
        records = {}
        for kind, (file, hasher) in self._files.items():
            path = self._temporary(kind)
            try:
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.replace(path, self._folder / f"{self._name}.{kind}")
            except OSError as error:
                raise explain(error, path) from error
            records[kind] = hasher.result()
        sync_folder(self._folder)
        self.entries.append(
            {
                "name": self._name,
                "documents": len(self._lengths),
                "tokens": self._tokens,
                "text_bytes": self._text_bytes,
                "files": records,
            }
        )
        self._start()

    def close(self) -> list[dict[str, Any]]:
        if self._lengths:
            self._finish()
        return self.entries

    def abort(self) -> None:
        """Remove what is unfinished."""
        for kind, (file, _) in self._files.items():
            file.close()
            self._temporary(kind).unlink(missing_ok=True)
