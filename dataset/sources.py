"""Where documents come from: files and folders of text, code and jsonl, and the interpreter's own library.

`find` lists the input files of a source in a fixed order under names that hold no machine path; `read`
turns one of them into documents. A line that cannot be read is a `Damage`, reported and counted.
"""

from __future__ import annotations

import bz2
import fnmatch
import gzip
import io
import json
import lzma
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dataset.files import DatasetError, explain

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIP_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
LINES = (".jsonl", ".ndjson")
SNIFF = 8192  # a NUL byte within this many bytes means: not text


class Document(NamedTuple):
    text: str
    line: int  # where it starts in its file, from 1


class Damage(NamedTuple):
    line: int
    message: str


@dataclass(frozen=True)
class Input:
    """One input file. name: source-relative, with '/'; kind: text, jsonl or parquet; size in bytes."""

    path: str
    name: str
    kind: str
    size: int

    def record(self) -> dict[str, Any]:
        """What plans and manifests keep: everything but the machine's path."""
        return {k: v for k, v in asdict(self).items() if k != "path"}


@dataclass(frozen=True)
class ReadOptions:
    """field: the text column of jsonl and parquet. kind: overrides the guess from the file name."""

    field: str = "text"
    include: tuple[str, ...] = ()
    kind: str | None = None


# ----------------------------------------------------------------------------- finding files


def find(source: str, options: ReadOptions) -> tuple[list[Input], dict[str, Any]]:
    """The input files of `source` in name order, and the record of the source for the manifest.

    Raises DatasetError when nothing is there.
    """
    if source == "pystdlib":
        return _pystdlib()
    path = Path(source)
    if path.is_file():
        found = [_input(path, path.name, options)]
    elif path.is_dir():
        base = path.resolve().name
        found = [_input(p, f"{base}/{rel}", options) for p, rel in _walk(path, SKIP_FOLDERS)]
        if options.include:
            found = [i for i in found if any(fnmatch.fnmatch(i.name, f"*{g}") for g in options.include)]
    else:
        raise DatasetError(
            f"source {source!r}: no such file or folder. Allowed: 'pystdlib', a file, a folder"
        )
    found.sort(key=lambda i: i.name.encode())
    if not found:
        chosen = f" that match {', '.join(options.include)}" if options.include else ""
        raise DatasetError(f"source {source!r}: the folder holds no files{chosen}")
    return found, {"source": path.resolve().name, "files": len(found), "bytes": sum(i.size for i in found)}


def _pystdlib() -> tuple[list[Input], dict[str, Any]]:
    """The Python sources of the running interpreter's library, without test folders and site-packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        Input(str(p), f"pystdlib/{rel}", "text", p.stat().st_size)
        for p, rel in _walk(root, SKIP_FOLDERS | TEST_FOLDERS)
        if rel.endswith(".py")
    ]
    if not files:
        raise DatasetError(f"source 'pystdlib': this interpreter ships no Python sources in {root}")
    files.sort(key=lambda i: i.name.encode())
    record = {"source": "pystdlib", "version": platform.python_version(), "files": len(files)}
    return files, record | {"bytes": sum(i.size for i in files)}


def _walk(root: Path, skip: frozenset[str]) -> Iterator[tuple[Path, str]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _input(path: Path, name: str, options: ReadOptions) -> Input:
    try:
        return Input(str(path), name, options.kind or kind_of(name), path.stat().st_size)
    except OSError as error:
        raise explain(error, path) from error


def kind_of(name: str) -> str:
    """text, jsonl or parquet, from the file name; .json.gz and the like are lines, .json alone is text."""
    name = name.lower()
    inner = name
    for ending in COMPRESSED:
        inner = inner.removesuffix(ending)
    if inner.endswith(LINES) or (inner != name and inner.endswith(".json")):
        return "jsonl"
    return "parquet" if inner.endswith(".parquet") else "text"


# ----------------------------------------------------------------------------- reading one


class Counting(io.RawIOBase):
    """A readable stream that hashes and counts what passes, for receipts and progress."""

    def __init__(self, raw: BinaryIO, seen) -> None:
        self._raw, self._seen = raw, seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._seen(memoryview(buffer)[:n])
        return n


def _decompressed(name: str, raw: BinaryIO) -> BinaryIO:
    name = name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw)  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)  # type: ignore[return-value]
    return raw


def read(source: Input, options: ReadOptions, seen=lambda data: None) -> Iterator[Document | Damage]:
    """Documents of one file, in order. seen: called with every raw piece read.

    Raises DatasetError when the file cannot be opened; damage inside is yielded, not raised.
    """
    if source.kind == "parquet":
        yield from _parquet(source, options, seen)
        return
    try:
        raw = open(source.path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise explain(error, Path(source.path)) from error
    with raw:
        stream = _decompressed(source.name, io.BufferedReader(Counting(raw, seen), 2**18))  # type: ignore[arg-type]
        yield from (_lines(stream, options.field) if source.kind == "jsonl" else _text(stream))


def _text(stream: BinaryIO) -> Iterator[Document | Damage]:
    try:
        data = stream.read()
    except Exception as error:  # zstandard, lzma and gzip each raise their own
        yield Damage(1, f"cannot decompress: {error}")
        return
    if b"\0" in data[:SNIFF]:
        yield Damage(1, "binary: a NUL byte near the start")
        return
    try:
        yield Document(data.decode("utf-8"), 1)
    except UnicodeDecodeError as error:
        yield Damage(
            data.count(b"\n", 0, error.start) + 1, f"not UTF-8: {error.reason} at byte {error.start}"
        )


def _lines(stream: BinaryIO, field: str) -> Iterator[Document | Damage]:
    number = 0
    try:
        for number, line in enumerate(io.BufferedReader(stream, 2**20), 1):  # type: ignore[type-var]
            if line.strip():
                yield _line(line, number, field)
    except Exception as error:  # a cut or damaged archive: what came before it is kept
        yield Damage(number + 1, f"cannot decompress further: {error}")


def _line(line: bytes, number: int, field: str) -> Document | Damage:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Damage(number, f"not JSON: {error}")
    if not isinstance(row, dict):
        return Damage(number, f"not an object but a {type(row).__name__}")
    text = row.get(field)
    if not isinstance(text, str):
        return Damage(number, f"no text in field {field!r}; the fields are {', '.join(sorted(row))}")
    return Document(text, number)


def _parquet(source: Input, options: ReadOptions, seen) -> Iterator[Document | Damage]:
    import pyarrow.parquet

    with open(source.path, "rb") as raw:  # parquet is read out of order: hash it in a pass of its own
        while piece := raw.read(2**20):
            seen(piece)
    try:
        file = pyarrow.parquet.ParquetFile(source.path, memory_map=True)
    except Exception as error:
        yield Damage(1, f"not parquet: {error}")
        return
    if options.field not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        yield Damage(1, f"no column {options.field!r}; the columns are {names}")
        return
    row = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=[options.field]):
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                yield Document(text, row) if isinstance(text, str) else Damage(row, "no text in this row")
    except Exception as error:
        yield Damage(row + 1, f"cannot read further: {error}")


def find_all(names: Iterable[str], options: ReadOptions) -> tuple[list[Input], list[dict[str, Any]]]:
    """Inputs of several sources, in the order given. Raises DatasetError when two would share a name."""
    inputs: list[Input] = []
    records = []
    for name in names:
        found, record = find(name, options)
        inputs += found
        records.append(record)
    seen: dict[str, str] = {}
    for one in inputs:
        if one.name in seen:
            raise DatasetError(
                f"two inputs are named {one.name!r}: {seen[one.name]} and {one.path}. Give their "
                "common parent folder as one source, or rename one"
            )
        seen[one.name] = one.path
    return inputs, records
