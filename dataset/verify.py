"""Looking at a dataset: every hash, what is in it, and the text behind any ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import DatasetError, digest, explain
from dataset.format import Dataset, load_tokenizer, map_file, open_dataset
from dataset.sidecar import sidecar_faults


def verify(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Hash every block of every shard and finished sidecar; check lengths against ids. One sentence for
    every fault found.

    Raises DatasetError when the dataset cannot even be opened by sizes.
    """
    data = open_dataset(path, check="sizes")
    shards = [shard for split in data.splits.values() for shard in split.shards]
    total = sum(r["bytes"] for s in shards for r in s.entry["files"].values())
    faults: list[str] = []
    done = 0
    for shard in shards:
        found = list(shard.damage())
        faults += found
        if not found:
            faults += _inconsistent(shard, data)
        done += sum(r["bytes"] for r in shard.entry["files"].values())
        progress(done, total)
    sources = data.path / "sources.jsonl"  # of a remote dataset the copy
    try:
        if digest(sources.read_bytes()) != data.manifest["inputs"]["blake3"]:
            faults.append(f"{sources}: differs from what was written")
    except OSError as error:
        faults.append(str(explain(error, sources)))
    try:
        load_tokenizer(data.path, data.manifest)
    except DatasetError as error:
        faults.append(str(error))
    return faults + sidecar_faults(data)


def _inconsistent(shard, data: Dataset) -> list[str]:
    """Faults that hashes cannot show: they would mean that the writer was wrong."""
    end = np.cumsum(shard.len, dtype=np.uint64)
    if len(end) != shard.documents or int(end[-1]) != shard.tokens or (end != shard.end).any():
        return [f"{shard.path('len')}: lengths do not add up to the ids of the shard"]
    ids = map_file(shard.path("tok"), shard.tok.dtype, in_order=True)
    if (ids[end.astype(np.int64) - 1] != data.eos_id).any():
        return [f"{shard.path('tok')}: a document does not end in EOS"]
    return []


def info(path: Path, samples: int = 2) -> dict[str, Any]:
    """Counts, length histogram, bytes per token and the first characters of some documents."""
    data = open_dataset(path, check="sizes")
    result: dict[str, Any] = {
        "path": str(path),
        "id": data.id,
        "dtype": data.manifest["dtype"],
        "vocab": data.vocab,
        "eos": f"{data.manifest['tokenizer']['eos']} ({data.eos_id})",
        "tokenizer": f"{data.manifest['tokenizer']['name']} ({data.manifest['tokenizer']['library']})",
        "tokenizer identity": data.tokenizer_identity,
        "sources": ", ".join(
            f"{s['source']}{' ' + s['version'] if 'version' in s else ''} ({s['files']:,} files)"
            for s in data.manifest["sources"]
        ),
        "counts": data.manifest["counts"],
        "splits": {},
    }
    for name, split in data.splits.items():
        lengths = np.concatenate([s.len for s in split.shards]) if split.shards else np.zeros(0, np.uint32)
        result["splits"][name] = {
            "documents": split.documents,
            "tokens": split.tokens,
            "text bytes": split.bytes,
            "shards": len(split.shards),
            "bytes per token": split.bytes / split.tokens if split.tokens else 0.0,
            "lengths": histogram(lengths),
            "samples": [
                data.tokenizer.decode(split.document(i)[:64]) for i in range(min(samples, len(split)))
            ],
        }
    return result


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Documents by length, in powers of two: {"1..1": n, "2..3": n, ...}."""
    if not len(lengths):
        return {}
    power = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(power)
    return {f"{2**p}..{2 ** (p + 1) - 1}": int(n) for p, n in enumerate(counts) if n}


def decode(path: Path, split: str, document: int, tokens: tuple[int, int] | None = None) -> str:
    """Text of one document, or of ids `tokens[0]:tokens[1]` of it. Raises DatasetError outside."""
    data = open_dataset(path, check="sizes")
    if split not in data.splits:
        raise DatasetError(f"{path}: no split {split!r}; it has {', '.join(data.splits)}")
    try:
        ids = data.splits[split].document(document)
    except IndexError:
        count = data.splits[split].documents
        has = f"0..{count - 1}" if count else "none"
        raise DatasetError(f"{path}: no document {document} in {split!r}; it has {has}") from None
    return data.tokenizer.decode(ids[slice(*tokens)] if tokens else ids)
