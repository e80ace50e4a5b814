"""Links lead somewhere, named files are there, and the reference is what the code says. Fast."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import pages as docs

PAGES = docs.pages()


def where(page: Path) -> str:
    return str(page.relative_to(docs.ROOT))


def test_there_are_pages() -> None:
    names = {where(p) for p in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/results.md", "docs/reference.md"} <= names
    assert sum(len(docs.links(p.read_text(encoding="utf-8"))) for p in PAGES) > 60


def broken(page: Path) -> list[str]:
    text, out = page.read_text(encoding="utf-8"), []
    for link in docs.links(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            out.append(f"{link}: not there")
        elif fragment and fragment not in docs.anchors(target.read_text(encoding="utf-8")):
            out.append(f"{link}: no such heading")
    return out


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_named_files_are_there(page: Path) -> None:
    named = docs.named_files(page.read_text(encoding="utf-8"))
    assert not [f for f in named if not ((docs.ROOT / f).exists() or (page.parent / f).exists())]


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](gone.md) [d](https://e.org)\n")
    assert broken(page) == ["page.md#two: no such heading", "gone.md: not there"]


def test_every_question_is_on_the_results_page() -> None:
    text = (docs.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    folders = {p.parent.name for p in (docs.ROOT / "experiments").glob("*/README.md")}
    assert not {name for name in folders if f"experiments/{name}/README.md" not in text}


def test_the_reference_is_current() -> None:
    """In a process of its own: other tests register toys."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "experiments.reference", "--check"]
    done = subprocess.run(words, cwd=docs.ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
