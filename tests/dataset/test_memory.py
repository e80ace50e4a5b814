"""Opening and reading two billion rows takes little memory of one's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset.format import write_manifest

ROWS, CONTEXT = 2 * 10**9, 1024
SCRIPT = """
import re, sys
import numpy as np
import dataset

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

data = dataset.open(sys.argv[1])
view = data.view(context=1024, seed=1)
assert view.rows >= 2 * 10**9, view.rows
for step in range(200):
    rows = np.arange(32) + step * 10_000_019
    assert view.arrays(rows).tokens.shape == (32, 1024)
print(own())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_two_billion_rows(byte_data, tmp_path):
    """500 shards of holes, 4 TB in all, of which the disk holds nothing."""
    folder = tmp_path / "wide"
    (folder / "shards").mkdir(parents=True)
    per_shard = 4 * 10**9
    count = -(-ROWS * CONTEXT // per_shard)
    entries = []
    for i in range(count):
        stem = folder / "shards" / f"train-{i:06d}-000"
        with open(f"{stem}.tok", "wb") as file:
            try:
                file.truncate(2 * per_shard)
            except OSError:
                pytest.skip("this file system has no files with holes of 8 GB")
        lengths = np.array([per_shard], "<u4")
        for kind in ("len", "end"):
            lengths.tofile(f"{stem}.{kind}")
        sizes = {"tok": 2 * per_shard, "len": 4, "end": 4}
        files = {kind: {"bytes": n, "blake3": "", "blocks": []} for kind, n in sizes.items()}
        entries.append({"name": stem.name, "tokens": per_shard, "documents": 1, "files": files})
    known = byte_data.manifest
    (folder / "tokenizer").symlink_to(byte_data.path / "tokenizer")
    split = {"tokens": per_shard * count, "documents": count, "text_bytes": 0, "shards": entries}
    empty = {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []}
    write_manifest(
        folder,
        {**{k: v for k, v in known.items() if k != "id"}, "splits": {"train": split, "heldout": empty}},
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200, f"{done.stdout.strip()} MB of its own"
