"""Values kept beside a dataset, one per id: reference losses or weights, without touching the dataset.

    DATA/sidecars/KEY/sidecar.json     {"dataset", "kind", "reference", "shards": {name: hashes}}
    DATA/sidecars/KEY/SHARD.wgt        f16, 1:1 with the ids of the shard

kind "loss": nats of a reference model, handed through as `batch.sidecar`; 0 at the first id of a document,
which is never predicted. kind "weight": multiplied into `batch.weights`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import (
    DatasetError,
    Hasher,
    block_hashes,
    canonical,
    digest,
    read_json,
    write_bytes,
    write_json,
)
from dataset.format import KINDS, Dataset, Shard, map_file

KINDS_OF_VALUE = ("loss", "weight")


def sidecar_key(dataset_id: str, reference: dict[str, Any]) -> str:
    """Names a sidecar: the data and what made the values."""
    return digest(canonical([dataset_id, reference]))[:16]


class Sidecar:
    """An opened sidecar. id: hash of its record, part of a view's hash. kind: "loss" or "weight"."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.folder = dataset.path / "sidecars" / name
        if not (self.folder / "sidecar.json").exists():
            have = sorted(
                p.name for p in (dataset.path / "sidecars").glob("*") if (p / "sidecar.json").exists()
            )
            raise DatasetError(
                f"{dataset.path}: no finished sidecar {name!r}; it has {', '.join(have) or 'none'}. "
                "Make one: python -m dataset score --help"
            )
        record = read_json(self.folder / "sidecar.json")
        if record["dataset"] != dataset.id:
            raise DatasetError(f"{self.folder}: made for dataset {record['dataset']}, this is {dataset.id}")
        self.kind: str = record["kind"]
        self.reference: dict[str, Any] = record["reference"]
        self.id = digest(canonical(record))
        self._maps: dict[str, np.ndarray] = {}
        for split in dataset.splits.values():
            for shard in split.shards:
                if shard.name in record["shards"]:
                    self._map(shard)

    def _map(self, shard: Shard) -> None:
        path = self.folder / f"{shard.name}.wgt"
        values = map_file(path, KINDS["wgt"])
        if len(values) != shard.tokens:
            raise DatasetError(
                f"{path}: {len(values):,} values for {shard.tokens:,} ids. Score the dataset again"
            )
        self._maps[shard.name] = values

    def covers(self, shard: Shard) -> bool:
        return shard.name in self._maps

    def values(self, shard: Shard) -> np.ndarray:
        """f16 [ids of the shard]. Raises DatasetError for a shard that was not scored."""
        if shard.name not in self._maps:
            raise DatasetError(
                f"{self.folder}: shard {shard.name} was not scored. Run `dataset score` for its split"
            )
        return self._maps[shard.name]


def give_alias(dataset: Dataset, name: str, alias: str) -> str:
    """Let a finished sidecar be called by another name as well. Raises DatasetError when that is taken."""
    folder = dataset.path / "sidecars"
    if not re.fullmatch(r"\w[\w.-]*", alias):
        raise DatasetError(f"--as {alias!r}: want letters, digits, '_', '.' and '-'")
    there = folder / alias
    if there.is_symlink() and os.readlink(there) == name:
        return alias
    if there.is_symlink() or there.exists():
        raise DatasetError(f"{there}: is another sidecar's name. Choose another --as, or delete that link")
    there.symlink_to(name)
    return alias


class SidecarWriter:
    """Writes a sidecar shard by shard; a restart finds what is done. `finish` makes it openable."""

    def __init__(self, dataset: Dataset, reference: dict[str, Any], kind: str = "loss") -> None:
        if kind not in KINDS_OF_VALUE:
            raise DatasetError(f"sidecar kind {kind!r}: allowed are {', '.join(KINDS_OF_VALUE)}")
        self.dataset, self.reference, self.kind = dataset, reference, kind
        self.name = sidecar_key(dataset.id, reference)
        self.folder = dataset.path / "sidecars" / self.name

    def _done(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.json"

    def has(self, shard: Shard) -> bool:
        return self._done(shard).exists() and (self.folder / f"{shard.name}.wgt").exists()

    def write(self, shard: Shard, values: np.ndarray) -> None:
        """values: float [ids of the shard]."""
        if len(values) != shard.tokens:
            raise ValueError(f"{len(values)} values for {shard.tokens} ids of {shard.name}")
        data = values.astype(KINDS["wgt"]).tobytes()
        hasher = Hasher()
        hasher.update(data)
        write_bytes(self.folder / f"{shard.name}.wgt", data)
        write_json(self._done(shard), hasher.result())

    def finish(self, shards: list[Shard]) -> Path:
        """The record of all shards written so far, `shards` and earlier ones. Gives the sidecar's folder."""
        done = {p.stem: read_json(p) for p in sorted(self.folder.glob("*-*-*.json"))}
        missing = [s.name for s in shards if s.name not in done]
        if missing:
            raise DatasetError(f"{self.folder}: not yet scored: {', '.join(missing)}")
        record = {"dataset": self.dataset.id, "kind": self.kind, "reference": self.reference, "shards": done}
        write_json(self.folder / "sidecar.json", record)
        return self.folder


def sidecar_faults(dataset: Dataset) -> list[str]:
    """One sentence for every damaged or missing file of the dataset's finished sidecars."""
    faults = []
    records = (dataset.path / "sidecars").glob("*/sidecar.json")
    for record in sorted(r for r in records if not r.parent.is_symlink()):  # links are other names
        for name, hashes in read_json(record)["shards"].items():
            path = record.parent / f"{name}.wgt"
            try:
                found = map_file(path, np.dtype("u1"), in_order=True)
            except DatasetError as error:
                faults.append(str(error))
                continue
            if len(found) != hashes["bytes"] or block_hashes(found.data) != hashes["blocks"]:
                faults.append(f"{path}: damaged. Delete the folder {record.parent}, and score again")
    return faults
