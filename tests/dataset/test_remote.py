"""Datasets behind a URL: the ids of the disk, a cache that keeps its bound, and nothing half fetched."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

import dataset
from dataset.files import DatasetError, digest
from dataset.format import write_manifest
from dataset.remote import as_url, open_remote
from dataset.verify import verify


@pytest.fixture
def url(byte_data, tmp_path):
    """The dataset of bytes, copied into fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    system.put(str(byte_data.path), root, recursive=True)
    yield f"memory:/{root}"
    system.rm(root, recursive=True)


def held(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("shards/*"))


def shards_of(data):
    return [s for split in data.splits.values() for s in split.shards]


def test_same_batches_and_verified(url, byte_data, tmp_path):
    far = open_remote(url, cache=tmp_path / "c")
    assert held(tmp_path / "c") == 0  # nothing is fetched before it is read
    for packing in ("concat", "best_fit"):
        near, there = (d.view(64, packing=packing, seed=3) for d in (byte_data, far))
        for step in (0, 5):
            a, b = near.batch(step, 8), there.batch(step, 8)
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.cu_seqlens, b.cu_seqlens)
    assert far.id == byte_data.id and far.tokenizer.decode(far.splits["train"].document(3))
    assert len(shards_of(far)) > 4


def test_the_bound_is_kept_and_the_oldest_goes(url, byte_data, tmp_path):
    one = max(r["bytes"] for s in shards_of(byte_data) for r in s.entry["files"].values())
    data = open_remote(url, cache=tmp_path / "c", limit=3 * one)
    split, want = data.splits["train"], list(byte_data.splits["train"])
    for i in np.random.default_rng(0).permutation(len(split)).tolist():
        assert np.array_equal(split.document(i), want[i])
        assert held(tmp_path / "c") <= 3 * one
    used = split.shards[1].tok  # just used: it outlives the next two fetches
    split.shards[2].tok, split.shards[1].tok, split.shards[3].tok
    assert split.shards[1].cache.folder.joinpath(f"{split.shards[1].name}.tok").exists()
    assert np.array_equal(used, byte_data.splits["train"].shards[1].tok)
    with pytest.raises(DatasetError, match="LATENT_LAB_CACHE_BYTES"):
        open_remote(url, cache=tmp_path / "d", limit=10).splits["train"].document(0)
    assert held(tmp_path / "d") == 0


def test_a_map_in_use_survives_eviction(url, byte_data, tmp_path):
    one = max(r["bytes"] for s in shards_of(byte_data) for r in s.entry["files"].values())
    data = open_remote(url, cache=tmp_path / "c", limit=one)
    first = data.splits["train"].shards[0].tok
    data.splits["train"].shards[1].tok  # noqa: B018 - evicts the first
    assert np.array_equal(first, byte_data.splits["train"].shards[0].tok)


def test_damage_behind_the_url_is_named_and_never_cached(url, byte_data, tmp_path):
    system, root = fsspec.core.url_to_fs(url)
    name = f"{byte_data.splits['train'].shards[0].name}.tok"
    good = system.cat(f"{root}/shards/{name}")
    system.pipe(f"{root}/shards/{name}", bytes([good[0] ^ 1]) + good[1:])
    data = open_remote(url, cache=tmp_path / "c")
    with pytest.raises(DatasetError, match=f"{name}.*damaged"):
        data.splits["train"].shards[0].tok  # noqa: B018
    assert held(tmp_path / "c") == 0 and not list((tmp_path / "c").rglob("*.tmp"))
    with pytest.raises(DatasetError, match=name):
        open_remote(url, check="full", cache=tmp_path / "e")
    system.pipe(f"{root}/shards/{name}", good[:-2])
    with pytest.raises(DatasetError, match="the manifest says"):
        open_remote(url, cache=tmp_path / "c")
    system.rm(f"{root}/shards/{name}")
    with pytest.raises(DatasetError, match=f"{name}: missing"):
        open_remote(url, cache=tmp_path / "c")


def test_a_changed_cache_is_fetched_anew(url, byte_data, tmp_path):
    """Bytes flipped on the local disk, and a file cut short, are noticed by the next run."""
    open_remote(url, check="full", cache=tmp_path / "c")
    paths = sorted((tmp_path / "c").rglob("shards/*.tok"))
    data = bytearray(paths[0].read_bytes())
    data[5] ^= 1
    paths[0].write_bytes(data)
    os.truncate(paths[1], 4)
    stale = paths[0].with_name(f"{paths[0].name}.{platform.node()}.999999999.tmp")
    other = paths[0].with_name(
        f"{paths[0].name}.{platform.node()}x.999999999.tmp"
    )  # a machine that shares it
    for path in (stale, other):
        path.write_bytes(b"half")
    again = open_remote(url, cache=tmp_path / "c")
    assert not stale.exists() and other.exists()
    for mine, theirs in zip(shards_of(again), shards_of(byte_data)):
        assert np.array_equal(mine.tok, theirs.tok)


def test_a_connection_that_breaks_leaves_nothing(url, tmp_path, monkeypatch):
    data = open_remote(url, cache=tmp_path / "c")
    shard = data.splits["train"].shards[0]
    kind = type(shard.cache.remote.system)
    whole = kind.open
    calls = []

    class Broken(io.BytesIO):
        def read(self, *_):
            if self.tell():
                raise OSError("connection reset")
            return super().read(100)

    def breaks(self, path, mode="rb", **options):
        calls.append(path)
        return Broken(bytes(500)) if len(calls) == 1 else whole(self, path, mode, **options)

    monkeypatch.setattr(kind, "open", breaks)
    with pytest.raises(DatasetError, match="connection reset"):
        shard.tok  # noqa: B018
    assert not list((tmp_path / "c").rglob("shards/*"))
    assert len(shard.tok) == shard.tokens  # and the next try works


@pytest.mark.parametrize("name", ["../../out", "/out", "a/../../out", "..", ""])
@pytest.mark.parametrize("what", ["shard", "tokenizer"])
def test_names_that_lead_out_of_the_cache_are_refused(byte_data, tmp_path, what, name):
    """The manifest of a stranger's dataset is whole by its own hash; what it names is not trusted."""
    shutil.copytree(byte_data.path, tmp_path / "far")
    manifest = json.loads((tmp_path / "far" / "manifest.json").read_text())
    if what == "shard":
        manifest["splits"]["train"]["shards"][0]["name"] = name
    else:
        manifest["tokenizer"]["files"][name] = digest(b"owned")
    write_manifest(tmp_path / "far", manifest)
    for opened in (tmp_path / "far", f"file://{tmp_path / 'far'}"):
        with pytest.raises(DatasetError, match="no name of a file"):
            dataset.open(opened)


def test_verify_and_the_limit_of_the_cache(byte_data, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_LAB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(byte_data.path, tmp_path / "copy", ignore=shutil.ignore_patterns("sidecars"))
    url = f"file://{tmp_path / 'copy'}"
    assert verify(Path(url)) == []
    monkeypatch.setenv("LATENT_LAB_CACHE_BYTES", "64G")
    with pytest.raises(DatasetError, match="LATENT_LAB_CACHE_BYTES='64G'"):
        dataset.open(url)


def test_threads_share_the_cache(url, byte_data, tmp_path):
    one = max(r["bytes"] for s in shards_of(byte_data) for r in s.entry["files"].values())
    data = open_remote(url, cache=tmp_path / "c", limit=2 * one)
    want, wrong = list(byte_data.splits["train"]), []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, len(want), 60).tolist():
            if not np.array_equal(data.splits["train"].document(i), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and held(tmp_path / "c") <= 2 * one


def test_open_takes_urls_and_the_paths_made_of_them(byte_data, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_LAB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(byte_data.path, tmp_path / "copy")
    url = f"file://{tmp_path / 'copy'}"
    for given in (url, Path(url)):
        assert dataset.open(given).id == byte_data.id
    assert as_url(Path("s3://bucket/a")) == "s3://bucket/a" and as_url("/tmp/x") is None
    with pytest.raises(DatasetError, match="no dataset here"):
        dataset.open(f"file://{tmp_path / 'nowhere'}")
    with pytest.raises(DatasetError, match="nosuchthing"):
        dataset.open("nosuchthing://x/y")
