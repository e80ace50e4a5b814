"""Tokenized corpora of other tools, in and out: Megatron `.bin/.idx` and datatrove `.ds`.

Megatron: PREFIX.bin holds ids, PREFIX.idx a header (magic, version, dtype code, counts), i32 lengths and i64
byte offsets of the sequences, i64 document index. datatrove: NAME.ds holds ids, NAME.ds.index u64 document
ends in ids, NAME.ds.metadata the tokenizer's name and the counts. Documents in both end with EOS.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import DatasetError, canonical, digest, explain, require_empty, write_bytes, writing
from dataset.format import DTYPES, SPLITS, Dataset, Split, dtype_for, map_file, open_dataset, write_manifest
from dataset.order import derive
from dataset.prepare import COUNTED, split_record, tokenizer_record
from dataset.tokenizers import Tokenizer
from dataset.writer import ShardWriter

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34  # bytes of an .idx
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
Documents = Iterator[np.ndarray]


# ----------------------------------------------------------------------------- reading


def read_megatron(prefix: Path) -> Documents:
    """int64 ids of every document. Raises DatasetError for another format or cut files."""
    index = _bytes(prefix.with_name(prefix.name + ".idx"))
    if index[:9] != MAGIC:
        raise DatasetError(f"{prefix}.idx: not a Megatron index (it starts with {index[:9]!r})")
    if len(index) < HEADER:
        raise DatasetError(f"{prefix}.idx: cut off: {len(index):,} bytes, the header alone has {HEADER}")
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, 9)
    if version != 1 or code not in MEGATRON_DTYPES:
        raise DatasetError(f"{prefix}.idx: version {version}, dtype code {code}: only version 1 is known")
    try:
        lengths = np.frombuffer(index, "<i4", sequences, HEADER).astype(np.int64)
        starts = np.frombuffer(index, "<i8", sequences, HEADER + 4 * sequences)
        bounds = np.frombuffer(index, "<i8", boundaries, HEADER + 12 * sequences)
    except ValueError:
        raise DatasetError(
            f"{prefix}.idx: cut off: {len(index):,} bytes for {sequences:,} sequences"
        ) from None
    dtype = np.dtype(MEGATRON_DTYPES[code])
    data = map_file(prefix.with_name(prefix.name + ".bin"), np.dtype("u1"))
    if sequences and int((starts + lengths * dtype.itemsize).max()) > len(data):
        raise DatasetError(f"{prefix}.bin: cut off: the index needs more than its {len(data):,} bytes")
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise DatasetError(f"{prefix}.idx: its documents are not all of its {sequences:,} sequences in order")
    for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        parts = [
            data[s : s + n * dtype.itemsize].view(dtype)
            for s, n in zip(starts[first:stop].tolist(), lengths[first:stop].tolist())
        ]
        yield np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def read_datatrove(path: Path) -> Documents:
    """int64 ids of every document of a `.ds` file. Raises DatasetError."""
    index = _bytes(path.with_name(path.name + ".index"))
    ends = np.frombuffer(index, "<u8", len(index) // 8).astype(np.int64)
    if len(index) % 8 or (np.diff(ends) < 0).any():
        raise DatasetError(f"{path}.index: {len(index):,} bytes are no list of document ends. Copy it again")
    size = path.stat().st_size if path.exists() else 0
    total = int(ends[-1]) if len(ends) else 0
    if total == 0 or size not in (2 * total, 4 * total):
        raise DatasetError(
            f"{path}: {size:,} bytes are neither 2 nor 4 for each of the {total:,} ids of its index"
        )
    ids = map_file(path, np.dtype("<u2" if size == 2 * total else "<u4"))
    for start, stop in zip([0, *ends[:-1].tolist()], ends.tolist()):
        yield ids[start:stop].astype(np.int64)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise explain(error, path) from error


READERS: dict[str, Callable[[Path], Documents]] = {"megatron": read_megatron, "datatrove": read_datatrove}


# ----------------------------------------------------------------------------- importing


def import_corpus(
    kind: str, paths: list[Path], tokenizer: Tokenizer, out: Path, heldout: float = 0.0
) -> Dataset:
    """A dataset folder from tokenized files, one shard series a file.

    EOS is put after documents that lack it. heldout: fraction of documents, by the hash of their ids.
    Raises DatasetError when an id is outside the vocabulary, or `out` is not empty. Then nothing is left.
    """
    if not 0 <= heldout < 1:
        raise DatasetError(f"--heldout {heldout}: a fraction in [0, 1) is needed")
    require_empty(out)
    try:
        (out / "shards").mkdir(parents=True)
    except OSError as error:
        raise explain(error, out) from error
    try:
        return _import(kind, paths, tokenizer, out, heldout)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _import(kind: str, paths: list[Path], tokenizer: Tokenizer, out: Path, heldout: float) -> Dataset:
    dtype = dtype_for(tokenizer.vocab)
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    inputs: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        writers = {s: ShardWriter(out / "shards", f"{s}-{number:06d}", dtype) for s in SPLITS}
        try:
            counts = _import_file(READERS[kind](path), path, tokenizer, writers, heldout)
            for split, writer in writers.items():
                entries[split] += writer.close()
        finally:
            for writer in writers.values():
                writer.abort()
        inputs.append({"name": path.name, **counts})
    return _manifest(out, tokenizer, dtype, entries, inputs, kind, heldout)


def _import_file(
    documents: Documents, path: Path, tokenizer: Tokenizer, writers, heldout: float
) -> dict[str, int]:
    table = tokenizer.bytes_per_token
    counts = {"documents": 0, "tokens": 0, "text_bytes": 0, "empty": 0}
    for number, ids in enumerate(documents):
        if not len(ids) or (len(ids) == 1 and ids[0] == tokenizer.eos_id):
            counts["empty"] += 1
            continue
        if ids.min() < 0 or ids.max() >= tokenizer.vocab:
            bad = int(ids[(ids < 0) | (ids >= tokenizer.vocab)][0])
            raise DatasetError(
                f"{path}: document {number} holds id {bad}, the tokenizer {tokenizer.name} has "
                f"{tokenizer.vocab:,} ids. Name the tokenizer it was made with"
            )
        if ids[-1] != tokenizer.eos_id:
            ids = np.append(ids, tokenizer.eos_id)
        size = int(table[ids].sum())
        draw = derive("heldout", ids.tobytes()) / 2**64
        writers[SPLITS[draw < heldout]].add(ids, size)
        for key, n in (("documents", 1), ("tokens", len(ids)), ("text_bytes", size)):
            counts[key] += n
    return counts


def _manifest(
    out: Path, tokenizer: Tokenizer, dtype: str, entries, inputs, kind: str, heldout: float
) -> Dataset:
    totals = {key: sum(i.get(key, 0) for i in inputs) for key in COUNTED}
    if not totals["documents"]:
        raise DatasetError(f"{out}: the files hold no documents")
    lines = b"".join(canonical(i) + b"\n" for i in inputs)
    write_bytes(out / "sources.jsonl", lines)
    write_manifest(
        out,
        {
            "plan": digest(lines),
            "dtype": dtype,
            "vocab": tokenizer.vocab,
            "eos_id": tokenizer.eos_id,
            "tokenizer": tokenizer_record(tokenizer, out),
            "splits": {split: split_record(entries[split]) for split in SPLITS},
            "sources": [{"source": f"{kind} import", "files": len(inputs)}],
            "inputs": {"files": len(inputs), "blake3": digest(lines)},
            "counts": totals,
            "heldout": heldout,
        },
    )
    return open_dataset(out)


# ----------------------------------------------------------------------------- exporting


def write_megatron(split: Split, prefix: Path) -> None:
    """PREFIX.bin and PREFIX.idx: one sequence a document, u16 as it is, u32 as i32 (Megatron has no u32)."""
    dtype = DTYPES[split.dataset.manifest["dtype"]]
    code, width = (8, 2) if dtype.itemsize == 2 else (4, 4)
    lengths = np.concatenate([s.len for s in split.shards]).astype("<i4")
    with writing(prefix.with_name(prefix.name + ".bin")) as file:
        for shard in split.shards:
            file.write(shard.tok.data)
    starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * width
    with writing(prefix.with_name(prefix.name + ".idx")) as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes() + starts.astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def write_datatrove(split: Split, path: Path) -> None:
    """PATH.ds with its .index and .metadata."""
    base = path if path.suffix == ".ds" else path.with_name(path.name + ".ds")
    with writing(base) as file:
        for shard in split.shards:
            file.write(shard.tok.data)
    ends = np.cumsum(np.concatenate([s.len for s in split.shards]), dtype="<u8")
    write_bytes(base.with_name(base.name + ".index"), ends.tobytes())
    width = DTYPES[split.dataset.manifest["dtype"]].itemsize
    note = (
        f"{split.dataset.manifest['tokenizer']['name']}|{width}\n{split.tokens}\n{split.tokens / 1e9:.2f} GT"
    )
    write_bytes(base.with_name(base.name + ".metadata"), note.encode())


WRITERS: dict[str, Callable[[Split, Path], None]] = {"megatron": write_megatron, "datatrove": write_datatrove}


def export_corpus(kind: str, data: Dataset, split: str, target: Path) -> None:
    """Write one split for another tool. Raises DatasetError when it is empty, or the target exists."""
    if split not in data.splits or not data.splits[split].documents:
        raise DatasetError(f"{data.path}: split {split!r} holds no documents")
    if not target.name:
        raise DatasetError(f"--out {target}: a prefix of file names is needed, such as {target / 'corpus'}")
    for ending in (".bin", ".idx", ".ds", ""):
        if (there := target.with_name(target.name + ending)).exists():
            raise DatasetError(f"{there}: exists already. Choose another target")
    WRITERS[kind](data.splits[split], target)
