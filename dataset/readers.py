"""One input file to documents: text, jsonl, parquet, Arrow; plain or compressed; local or remote.

A place that cannot be read is a `Damage`: reported with its line, counted, never silent.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import tempfile
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import orjson

from dataset.files import DatasetError, explain
from dataset.sources import COMPRESSED, Input, is_remote

SNIFF = 8192  # a NUL byte within this many bytes means: not text
PIECE = 2**20
STEP = 2**17  # decompressed at once
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's, which every library writes that closes a stream

Seen = Callable[[bytes | memoryview], None]


class Document(NamedTuple):
    text: str
    line: int  # where it starts in its file, from 1; of tables, the row


class Damage(NamedTuple):
    line: int
    message: str


class _Watched(io.RawIOBase):
    """A readable stream that shows what passes, for hashes and progress."""

    def __init__(self, raw: BinaryIO, seen: Seen) -> None:
        self._raw, self._seen = raw, seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._seen(data)
        return len(data)


class _Pieces(io.RawIOBase):
    """A readable stream of pieces of bytes: what comes before a damaged piece is read before the error."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._ready = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._ready = memoryview(piece)
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Decompressed frames, one after another. The library's own reader takes a cut file for a whole one."""
    import zstandard

    new = zstandard.ZstdDecompressor().decompressobj
    frame, started = new(), False
    while data := raw.read(STEP):
        while data:
            started = True
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame, started = new(), False
    if started:
        raise EOFError("the file ends inside a zstd frame")


def _inflated(name: str, raw: io.BufferedReader) -> Iterator[bytes]:
    """Decompressed pieces, for `name`'s ending. Raises what the libraries raise for damage."""
    if not raw.peek(1):  # gzip and zstd pass it for an archive of nothing
        raise EOFError("the file has no bytes, not even a header")
    if name.endswith(".zst"):
        yield from _zstd(raw)
        return
    # read1, as a longer read that meets the damaged place would lose what it has read before it
    opener: Any = lzma.open if name.endswith(".xz") else bz2.open if name.endswith(".bz2") else gzip.open
    stream = opener(raw, "rb")
    yield from iter(lambda: stream.read1(STEP), b"")


def _decompressed(name: str, raw: Any) -> Any:  # both are io.BufferedReader, generic in newer stubs
    name = name.lower()
    if not name.endswith(COMPRESSED):
        return raw
    return io.BufferedReader(_Pieces(_inflated(name, raw)), PIECE)


@contextlib.contextmanager
def _opened(source: Input) -> Iterator[BinaryIO]:
    """The file's bytes; a remote file is streamed. Raises DatasetError when it cannot be opened."""
    try:
        if is_remote(source.path):
            import fsspec

            file = fsspec.open(source.path, "rb").open()
        else:
            file = open(source.path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise explain(error, source.path) from error
    except Exception as error:  # each remote file system raises its own
        raise DatasetError(f"{source.path}: cannot be opened: {error}") from error
    with file:
        yield file


def read(source: Input, field: str, seen: Seen = lambda data: None) -> Iterator[Document | Damage]:
    """Documents of one file, in order. field: the text column of jsonl and tables. seen: gets all raw bytes.

    Raises DatasetError when the file cannot be opened; damage inside is yielded, not raised.
    """
    with _opened(source) as raw:
        if source.kind in TABLES:
            yield from _table(source.kind, raw, field, seen)
            return
        watched = io.BufferedReader(_Watched(raw, seen), PIECE)  # type: ignore[arg-type]
        stream = _decompressed(source.name, watched)
        yield from (_lines(stream, field) if source.kind == "jsonl" else _text(stream))
        while watched.read(PIECE):  # what follows a damaged place still belongs to the file's hash
            pass


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
        line = data.count(b"\n", 0, error.start) + 1
        yield Damage(line, f"not UTF-8: {error.reason} at byte {error.start}")


def _lines(stream: BinaryIO, field: str) -> Iterator[Document | Damage]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)  # JSON has none, but editors on Windows put one there
            if line.strip():
                yield _line(line, number, field)
    except Exception as error:  # a cut or damaged archive: what came before it is kept
        yield Damage(number + 1, f"cannot decompress further: {error}")


def _line(line: bytes, number: int, field: str) -> Document | Damage:
    try:
        row = orjson.loads(line)
    except ValueError:  # it is stricter than Python's reader (NaN, halves of surrogate pairs), which decides
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return Damage(number, f"not JSON: {error}")
    if not isinstance(row, dict):
        return Damage(number, f"not an object but a {type(row).__name__}")
    text = row.get(field)
    if not isinstance(text, str):
        return Damage(number, f"no text in field {field!r}; the fields are {', '.join(sorted(row))}")
    return Document(text, number)


# ----------------------------------------------------------------------------- tables


def _parquet(file: BinaryIO, field: str) -> Iterator[Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    _check_column(field, table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        yield batch.column(0)


def _arrow(file: BinaryIO, field: str) -> Iterator[Any]:
    """The stream format that Hugging Face `datasets` saves, or the file format.

    A stream whose writer was killed between two batches has no other sign of it than the missing end mark.
    """
    import pyarrow.ipc

    stream = True
    try:
        batches: Any = pyarrow.ipc.open_stream(file)
        schema = batches.schema
    except pyarrow.ArrowInvalid:
        file.seek(0)
        stream = False
        whole = pyarrow.ipc.open_file(file)
        schema, batches = whole.schema, (whole.get_batch(i) for i in range(whole.num_record_batches))
    _check_column(field, schema.names)
    for batch in batches:
        yield batch.column(schema.names.index(field))
    if stream:
        file.seek(-len(END_OF_STREAM), os.SEEK_END)
        if file.read() != END_OF_STREAM:
            raise EOFError("the stream has no end mark; its writer was stopped, or the file is cut")


TABLES = {"parquet": _parquet, "arrow": _arrow}


def table_rows(source: Input, field: str) -> int:
    """Rows of a parquet or Arrow file, as far as it can be read."""
    rows = 0
    with _opened(source) as file, contextlib.suppress(Exception):  # pyarrow's own, for every kind of damage
        for column in TABLES[source.kind](file, field):
            rows += len(column)
    return rows


def _check_column(field: str, names: list[str]) -> None:
    if field not in names:
        raise ValueError(f"no column {field!r}; the columns are {', '.join(names)}")


def _table(kind: str, raw: BinaryIO, field: str, seen: Seen) -> Iterator[Document | Damage]:
    """Tables are read out of order, so they pass through a local file first, hashed on the way."""
    row = 0
    with tempfile.TemporaryFile() if not isinstance(raw, io.BufferedReader) else raw as local:
        while piece := raw.read(PIECE):
            seen(piece)
            if local is not raw:
                local.write(piece)
        local.seek(0)
        try:
            for column in TABLES[kind](local, field):  # type: ignore[arg-type]
                for value in column:
                    row += 1
                    text = value.as_py()
                    yield Document(text, row) if isinstance(text, str) else Damage(row, "no text in this row")
        except Exception as error:  # pyarrow's own, for every kind of damage
            yield Damage(row + 1, f"cannot be read further as {kind}: {error}")
