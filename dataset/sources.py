"""Where documents come from: files, folders, remote places, and the interpreter's own library.

`find` lists the input files of a source in a fixed order, under names that hold no machine path.
"""

from __future__ import annotations

import fnmatch
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.files import DatasetError, explain

KINDS = ("text", "jsonl", "parquet", "arrow")
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIP_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
COMPRESSED = (".gz", ".dz", ".zst", ".xz", ".bz2")
LINES = (".jsonl", ".ndjson")
# What Hugging Face `datasets` writes beside its Arrow files.
DATASETS_FILES = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})
REMOTE_KINDS = ("jsonl", "parquet", "arrow")


@dataclass(frozen=True)
class Input:
    """One input file. path: or URL; name: source-relative, with '/'; kind: see KINDS; size in bytes."""

    path: str
    name: str
    kind: str
    size: int

    def record(self) -> dict[str, Any]:
        """What plans and manifests keep: everything but the machine's path."""
        return {k: v for k, v in asdict(self).items() if k != "path"}


@dataclass(frozen=True)
class ReadOptions:
    """field: the text column of jsonl and tables. kind: overrides the guess from the file name.

    include: patterns; a folder's files must match one ('*.py', 'src/*').
    """

    field: str = "text"
    include: tuple[str, ...] = ()
    kind: str | None = None


# ----------------------------------------------------------------------------- finding files


def find(source: str, options: ReadOptions) -> tuple[list[Input], dict[str, Any]]:
    """The input files of `source` in name order, and the record of the source for the manifest.

    source: "pystdlib", a file, a folder, any fsspec URL, or "hf:ORG/NAME" for a data set on the hub.
    Raises DatasetError when nothing is there.
    """
    if source == "pystdlib":
        return _pystdlib()
    if source.startswith("hf:") and not is_remote(source):
        source = "hf://datasets/" + source.removeprefix("hf:")
    if is_remote(source):
        return _remote(source, options)
    path = Path(source)
    if path.is_file():
        found = [_input(path, path.name, options)]
    elif path.is_dir():
        base = path.resolve().name
        found = [_input(p, f"{base}/{rel}", options) for p, rel in _walk(path, SKIP_FOLDERS)]
        if any(i.kind == "arrow" for i in found):
            found = [i for i in found if PurePosixPath(i.name).name not in DATASETS_FILES]
        found = [i for i in found if _included(i.name, options)]
    else:
        raise DatasetError(
            f"source {source!r}: no such file or folder. Allowed: 'pystdlib', a file, a folder, a URL, "
            "hf:ORG/NAME"
        )
    found.sort(key=lambda i: i.name.encode())
    if not found:
        chosen = f" that match {', '.join(options.include)}" if options.include else ""
        raise DatasetError(f"source {source!r}: the folder holds no files{chosen}")
    return found, {"source": path.resolve().name, "files": len(found), "bytes": sum(i.size for i in found)}


def _pystdlib() -> tuple[list[Input], dict[str, Any]]:
    """The Python sources of the running interpreter's library, without test folders and site-packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        Input(str(p), f"pystdlib/{rel}", "text", p.stat().st_size)
        for p, rel in _walk(root, SKIP_FOLDERS | TEST_FOLDERS)
        if rel.endswith(".py")
    ]
    if not files:
        raise DatasetError(f"source 'pystdlib': this interpreter ships no Python sources in {root}")
    files.sort(key=lambda i: i.name.encode())
    record = {"source": "pystdlib", "version": platform.python_version(), "files": len(files)}
    return files, record | {"bytes": sum(i.size for i in files)}


def is_remote(path: str) -> bool:
    return "://" in path


def _remote(url: str, options: ReadOptions) -> tuple[list[Input], dict[str, Any]]:
    """Files of lines or tables behind an fsspec URL: one file, or all below a folder."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
        paths = [root] if system.isfile(root) else sorted(system.find(root))
        found = []
        for path in paths:
            name = root.rstrip("/").rsplit("/", 1)[-1] + path[len(root) :]
            kind = options.kind or kind_of(name)
            if (kind in REMOTE_KINDS or options.kind or path == root) and _included(name, options):
                found.append(Input(system.unstrip_protocol(path), name, kind, int(system.size(path) or 0)))
    except Exception as error:  # each file system raises its own; the network may be missing
        raise DatasetError(f"source {url!r}: cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        raise DatasetError(f"source {url!r}: no {', '.join(REMOTE_KINDS)} files there")
    found.sort(key=lambda i: i.name.encode())
    return found, {"source": url, "files": len(found), "bytes": sum(i.size for i in found)}


def _included(name: str, options: ReadOptions) -> bool:
    return not options.include or any(fnmatch.fnmatch(name, f"*{g}") for g in options.include)


def _walk(root: Path, skip: frozenset[str]) -> Iterator[tuple[Path, str]]:
    """Files below `root`, each folder once: links come last, those that lead back up not at all."""

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out
        raise explain(error, error.filename or root) from error

    tops, seen = [root], set()
    for top in tops:
        for folder, folders, names in os.walk(top, onerror=refuse):
            here = Path(folder).resolve()
            folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
            if here in seen:
                folders.clear()
                continue
            seen.add(here)
            links = [Path(folder, f) for f in folders if Path(folder, f).is_symlink()]
            tops += [link for link in links if not here.is_relative_to(link.resolve())]
            for name in sorted(names):
                path = Path(folder, name)
                if not name.startswith(".") and path.is_file():
                    yield path, path.relative_to(root).as_posix()


def _input(path: Path, name: str, options: ReadOptions) -> Input:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{str(path)!r}: the file's name is not UTF-8. Rename it") from None
    try:
        return Input(str(path), name, options.kind or kind_of(name), path.stat().st_size)
    except OSError as error:
        raise explain(error, path) from error


def kind_of(name: str) -> str:
    """text, jsonl, parquet or arrow, from the name; .json.gz and the like are lines, .json alone is text."""
    name = name.lower()
    inner = name
    for ending in COMPRESSED:
        inner = inner.removesuffix(ending)
    if inner.endswith(LINES) or (inner != name and inner.endswith(".json")):
        return "jsonl"
    return next((kind for kind in ("parquet", "arrow") if inner.endswith(f".{kind}")), "text")


def find_all(names: Iterable[str], options: ReadOptions) -> tuple[list[Input], list[dict[str, Any]]]:
    """Inputs of several sources, in the order given. Raises DatasetError when two would share a name."""
    inputs: list[Input] = []
    records = []
    for name in names:
        found, record = find(name, options)
        inputs += found
        records.append(record)
    seen: dict[str, str] = {}
    for one in inputs:
        if one.name in seen:
            raise DatasetError(
                f"two inputs are named {one.name!r}: {seen[one.name]} and {one.path}. Give their "
                "common parent folder as one source, or rename one"
            )
        seen[one.name] = one.path
    return inputs, records
