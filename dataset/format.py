"""A dataset on disk: shards of raw ids with document lengths, bound by a hashed manifest.

    manifest.json              what follows, with counts and hashes; its own hash is the dataset's id
    sources.jsonl              one line per input file: name, size, blake3, documents, tokens, drops
    tokenizer/                 see `dataset.tokenizers`
    shards/SPLIT-TASK-PART.tok ids, raw little-endian u16 (vocab <= 65,536) or u32, EOS after every document
                          .len u32 per document: its ids, EOS included
                          .end u32 per document: running sum of .len, so that a row finds its documents
                          .msk u8 per id: 1 where a loss is wanted (optional)
                          .wgt f16 per id: a weight or a reference loss (optional; see `dataset.score`)

Boundaries always come from the lengths, never from a search for EOS.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset import files
from dataset.files import DatasetError, block_hashes, canonical, digest, explain, read_json, write_json
from dataset.tokenizers import Tokenizer

if TYPE_CHECKING:
    from dataset.views import View

FORMAT, VERSION = "latent-lab-dataset", 1
DTYPES: dict[str, np.dtype] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
KINDS: dict[str, np.dtype] = {
    "len": np.dtype("<u4"),
    "end": np.dtype("<u4"),
    "msk": np.dtype("u1"),
    "wgt": np.dtype("<f2"),
}
SPLITS = ("train", "heldout")
CHECK_AT_OPEN = 2**30  # bytes: below this, opening hashes everything (under 0.3 s)


def dtype_for(vocab: int) -> str:
    return "u16" if vocab <= 2**16 else "u32"


def manifest_id(manifest: dict[str, Any]) -> str:
    """blake3 of the canonical manifest without its own id."""
    return digest(canonical({k: v for k, v in manifest.items() if k != "id"}))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest = manifest | {"format": FORMAT, "version": VERSION}
    manifest["id"] = manifest_id(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def map_file(path: Path, dtype: np.dtype, in_order: bool = False) -> np.ndarray:
    """A read-only memory map. Unless it is read in order, the kernel is asked for no read-ahead."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, dtype)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise explain(error, path) from error
    if not in_order and hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


class Shard:
    """One shard: `entry` is its manifest record, arrays are mapped when first touched."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: str) -> None:
        self.folder, self.entry, self.name = folder / "shards", entry, entry["name"]
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.dtype = DTYPES[dtype]

    def path(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"

    def has(self, kind: str) -> bool:
        return kind in self.entry["files"]

    @cached_property
    def tok(self) -> np.ndarray:
        return self.array("tok")

    @cached_property
    def end(self) -> np.ndarray:
        return self.array("end")

    @cached_property
    def len(self) -> np.ndarray:
        return self.array("len")

    @cached_property
    def msk(self) -> np.ndarray:
        return self.array("msk")

    def array(self, kind: str) -> np.ndarray:
        """A file's values, mapped."""
        return map_file(self.path(kind), self.dtype if kind == "tok" else KINDS[kind])

    def document(self, i: int) -> np.ndarray:
        """Ids of the i-th document, EOS included (a view of the map)."""
        stop = int(self.end[i])
        return self.tok[stop - int(self.len[i]) : stop]

    def check_sizes(self) -> None:
        """Raises DatasetError when a file is missing or has another size than the manifest says."""
        for kind, record in self.entry["files"].items():
            path = self.path(kind)
            try:
                size = path.stat().st_size
            except OSError:
                raise DatasetError(f"{path}: missing. Copy the dataset again, or prepare it anew") from None
            if size != record["bytes"]:
                raise DatasetError(
                    f"{path}: {size:,} bytes, the manifest says {record['bytes']:,}. The file was cut or "
                    "replaced: copy the dataset again, or prepare it anew"
                )

    def damage(self) -> Iterator[str]:
        """One sentence for every block whose hash differs."""
        for kind, record in self.entry["files"].items():
            data = map_file(self.path(kind), np.dtype("u1"), in_order=True)
            for i, (found, wanted) in enumerate(zip(block_hashes(data.data), record["blocks"])):
                if found != wanted:
                    start = i * files.BLOCK
                    stop = min(start + files.BLOCK, record["bytes"])
                    yield f"{self.path(kind)}: block {i} (bytes {start:,} to {stop:,}) is damaged"


class Split:
    """The documents of one split, in manifest order."""

    def __init__(self, dataset: Dataset, name: str, record: dict[str, Any]) -> None:
        self.dataset, self.name, self.record = dataset, name, record
        self.tokens: int = record["tokens"]
        self.documents: int = record["documents"]
        self.bytes: int = record["text_bytes"]
        self.shards = [dataset.shard(entry) for entry in record["shards"]]
        self.starts = np.cumsum([0, *(s.tokens for s in self.shards)], dtype=np.int64)
        self.first_documents = np.cumsum([0, *(s.documents for s in self.shards)], dtype=np.int64)

    def has(self, kind: str) -> bool:
        return bool(self.shards) and all(s.has(kind) for s in self.shards)

    def document(self, i: int) -> np.ndarray:
        """Ids of document i of the split, EOS included. Raises IndexError past the end."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        s = int(np.searchsorted(self.first_documents, i, "right")) - 1
        return self.shards[s].document(i - int(self.first_documents[s]))

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in self.shards:
            for i in range(shard.documents):
                yield shard.document(i)

    def __len__(self) -> int:
        return self.documents


class Dataset:
    """An opened dataset. `dataset.open(path)` makes one; nothing is read until it is asked for.

    manifest, vocab, eos_id, id (hash of the canonical manifest), splits {name: Split}, tokenizer.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], shard: Callable[[dict[str, Any]], Shard] | None = None
    ) -> None:
        """shard: makes a shard of its manifest record; None: files in `path`."""
        self.path, self.manifest = path, manifest
        self.shard = shard or (lambda entry: Shard(path, entry, manifest["dtype"]))
        self.id: str = manifest["id"]
        self.vocab: int = manifest["vocab"]
        self.eos_id: int = manifest["eos_id"]
        self.tokenizer_identity: str = manifest["tokenizer"]["identity"]
        self.splits = {name: Split(self, name, record) for name, record in manifest["splits"].items()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path, self.manifest)

    def require(self, vocab: int | None = None, identity: str | None = None) -> None:
        """Refuse a model of another vocabulary or tokenizer. Raises DatasetError."""
        if vocab is not None and vocab != self.vocab:
            raise DatasetError(
                f"{self.path}: the dataset has a vocabulary of {self.vocab:,} ids, the model {vocab:,}. "
                f"Set vocab: {self.vocab}, or prepare the text with the model's tokenizer"
            )
        if identity is not None and identity != self.tokenizer_identity:
            raise DatasetError(
                f"{self.path}: prepared with tokenizer {self.tokenizer_identity} "
                f"({self.manifest['tokenizer']['name']}), the model was trained with {identity}. Prepare the "
                "text again with the model's tokenizer"
            )

    def view(self, context: int, packing: str = "concat", seed: int = 0, **options: Any) -> View:
        """See `dataset.views.View`."""
        from dataset.views import View

        return View(self, context=context, packing=packing, seed=seed, **options)


def load_tokenizer(path: Path, manifest: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load(path / "tokenizer")
    recorded = manifest["tokenizer"]["identity"]
    if tokenizer.identity != recorded:
        raise DatasetError(
            f"{path / 'tokenizer'}: tokenizer {tokenizer.identity} is not the dataset's own "
            f"({recorded}). Put the dataset's own tokenizer folder back, or prepare it anew"
        )
    return tokenizer


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a dataset folder, checked against its own hash. Raises DatasetError."""
    file = path / "manifest.json"
    if not file.is_file():
        if (path / ".prepare").is_dir():
            raise DatasetError(
                f"{path}: its preparation is not finished. Run the same `prepare` command again"
            )
        raise DatasetError(
            f"{path}: no dataset here (no manifest.json). Make one: python -m dataset prepare --help"
        )
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DatasetError(f"{file}: not a manifest of this lab (format is no {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise DatasetError(f"{file}: version {manifest.get('version')}, this code reads version {VERSION}")
    if manifest.get("id") != manifest_id(manifest):
        raise DatasetError(
            f"{file}: its content does not match its own id: edited by hand or damaged. Put the original back"
        )
    _check_names(file, manifest)
    return manifest


def _check_names(file: Path, manifest: dict[str, Any]) -> None:
    """Names become paths, of a remote dataset's cache too: none may lead out of its folder."""
    names = [*manifest["tokenizer"]["files"]]
    names += [entry["name"] for split in manifest["splits"].values() for entry in split["shards"]]
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise DatasetError(f"{file}: {name!r} is no name of a file of a dataset. Do not use this dataset")


def open_dataset(path: str | os.PathLike, check: str = "auto") -> Dataset:
    """Open a dataset folder, or one behind a URL (`dataset.remote`).

    check: "sizes" (every file present, with the recorded size), "full" (every hash as well), or "auto":
    full up to 1 GiB, sizes beyond (`python -m dataset verify` does the rest).
    Raises DatasetError for a missing or cut shard, damaged blocks, an edited manifest, another tokenizer.
    """
    from dataset import remote

    if (url := remote.as_url(path)) is not None:
        return remote.open_remote(url, check)
    folder = Path(path)
    manifest = read_manifest(folder)
    dataset = Dataset(folder, manifest)
    check_tokenizer(folder, manifest)
    total = 0
    for split in dataset.splits.values():
        for shard in split.shards:
            shard.check_sizes()
            total += sum(record["bytes"] for record in shard.entry["files"].values())
    if check == "full" or (check == "auto" and total <= CHECK_AT_OPEN):
        for split in dataset.splits.values():
            for shard in split.shards:
                for sentence in shard.damage():
                    raise DatasetError(f"{sentence}. Copy the dataset again, or prepare it anew")
    return dataset


def check_tokenizer(path: Path, manifest: dict[str, Any]) -> None:
    """Compare the stored tokenizer files with the manifest without building the tokenizer."""
    for name, recorded in manifest["tokenizer"]["files"].items():
        file = path / "tokenizer" / name
        try:
            found = digest(file.read_bytes())
        except OSError as error:
            raise explain(error, file) from error
        if found != recorded:
            raise DatasetError(
                f"{file}: not the tokenizer this dataset was written with (its hash differs). Put the "
                "dataset's own tokenizer folder back, or prepare it anew"
            )
