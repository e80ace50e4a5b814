"""Real corpora of at least 200 MB: every document's ids decode to its text. `make test-slow AREA=corpus`.

The Python sources and headers that are installed here, and any folders of text named in LATENT_LAB_CORPUS
(separated by colons), for example unpacked Debian packages: dict-gcide, linux-doc, python3-doc, perl-doc.
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from pathlib import Path

import blake3
import pytest

from dataset.plan import Request
from dataset.prepare import prepare
from dataset.readers import SNIFF
from dataset.sources import SKIP_FOLDERS
from dataset.train_tokenizer import train

KINDS = (".py", ".pyi", ".h", ".hpp", ".cuh", ".txt", ".md", ".rst", ".pod")


def folders() -> list[Path]:
    named = [Path(p) for p in os.environ.get("LATENT_LAB_CORPUS", "").split(":") if p]
    return [Path(sysconfig.get_paths()["purelib"]), *named]


def texts(root: Path):
    """The bytes of every file that is text: read here, not by the code under test."""
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d not in SKIP_FOLDERS and not d.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix not in KINDS or not path.is_file():
                continue
            data = path.read_bytes()
            if not data or b"\0" in data[:SNIFF]:
                continue
            try:
                data.decode()
            except UnicodeDecodeError:
                continue
            yield data


@pytest.mark.slow
def test_corpus_decodes_to_its_texts(tmp_path):
    wanted: Counter[bytes] = Counter()
    size = 0
    for root in folders():
        for data in texts(root):
            wanted[blake3.blake3(data).digest()] += 1
            size += len(data)
    if size < 200e6:
        pytest.skip(f"{size / 1e6:.0f} MB of text here; name more folders in LATENT_LAB_CORPUS")
    train(("pystdlib",), 8192, tmp_path / "bpe", sample_bytes=4 * 2**20)
    sources = tuple(str(p) for p in folders())
    include = tuple(f"*{kind}" for kind in KINDS)
    request = Request(sources, tokenizer=str(tmp_path / "bpe"), include=include)
    data = prepare(request, tmp_path / "data", workers=2).dataset
    found: Counter[bytes] = Counter()
    for split in data.splits.values():
        for ids in split:
            assert ids[-1] == data.eos_id
            found[blake3.blake3(data.tokenizer.decode_bytes(ids[:-1])).digest()] += 1
    assert found == wanted
    assert data.manifest["counts"]["text_bytes"] == size
