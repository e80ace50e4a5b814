"""The datatrove pipeline, for real: what it drops, what it keeps, and that `prepare` reads what it leaves.

pip install '.[prepare]' && make test-slow AREA=pipeline
"""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dataset.plan import Request
from dataset.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "argparse", "ast", "calendar", "cmd", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest",
    "enum", "functools", "heapq", "inspect", "logging", "optparse", "pdb", "profile", "random", "shlex",
    "socket", "subprocess", "tarfile", "textwrap", "threading", "trace", "typing", "unittest", "zipfile",
)  # fmt: skip


def prose() -> list[str]:
    """Long docstrings of the standard library, whole words and full sentences."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        members = [module, *(v for _, v in inspect.getmembers(module, inspect.isclass))]
        for member in members:
            text = inspect.getdoc(member) or ""
            if len(text.split()) >= 80 and text not in found:
                found.append(text)
    return found


@pytest.mark.slow
def test_pipeline_filters_and_deduplicates(tmp_path):
    if importlib.util.find_spec("datatrove") is None:
        pytest.skip("datatrove is not installed: pip install 'latent-lab[prepare]'")
    texts = prose()
    noise = ["@@## 1234 !!! " * 60, "buy buy buy buy " * 80]
    rows = [*texts, *noise, *texts]  # everything twice, so that every document that is kept had a copy
    (tmp_path / "raw").mkdir()
    for part in range(2):
        with gzip.open(tmp_path / "raw" / f"{part}.jsonl.gz", "wt") as file:
            for i, text in enumerate(rows[part::2]):
                file.write(json.dumps({"text": text, "id": f"{part}/{i}"}) + "\n")
    line = [sys.executable, "dataset/pipelines/filter_dedupe.py", tmp_path / "raw", tmp_path / "clean"]
    done = subprocess.run([*line, "--tasks", "2", "--workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    data = prepare(Request((str(tmp_path / "clean" / "deduplicated"),)), tmp_path / "data").dataset
    kept = Counter(data.tokenizer.decode(ids) for split in data.splits.values() for ids in split)
    assert len(kept) >= 5 and set(kept) <= set(texts)  # Gopher's filters want long plain prose
    assert max(kept.values()) == 1 and not set(kept) & set(noise)
