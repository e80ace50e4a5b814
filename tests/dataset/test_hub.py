"""`hf:ORG/NAME` through the hub's own client, against a server on loopback that answers as the hub does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from dataset.files import DatasetError
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.sources import ReadOptions, find

hub = pytest.importorskip("huggingface_hub", reason="the hub's client comes with transformers")
NAME = "lab/words"
TEXTS = ["one", "zwei zwei", "три", "四"]


class Hub(BaseHTTPRequestHandler):
    """The five calls of the client that listing and reading a data set take; files are those of `root`."""

    root: Path
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None: ...

    def entries(self, paths) -> list[dict]:
        return [
            {"path": p.relative_to(self.root).as_posix(), "oid": "0" * 40}
            | ({"type": "directory"} if p.is_dir() else {"type": "file", "size": p.stat().st_size})
            for p in sorted(paths)
        ]

    def reply(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, data) -> None:
        self.reply(200, json.dumps(data).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.reply(404, b"{}", X_Error_Code=code)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        recursive = "recursive=true" in self.path.lower()
        self.asked.append(path)
        if path in (f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/main"):
            self.json({"id": NAME, "sha": "1" * 40, "siblings": []})
        elif path.startswith(f"/api/datasets/{NAME}/tree/main"):
            folder = self.root / path.removeprefix(f"/api/datasets/{NAME}/tree/main").strip("/")
            if not folder.is_dir():
                return self.missing("EntryNotFound")
            self.json(self.entries(folder.rglob("*") if recursive else folder.iterdir()))
        elif path.startswith(f"/datasets/{NAME}/resolve/main/"):
            self.file(self.root / path.removeprefix(f"/datasets/{NAME}/resolve/main/"))
        else:
            self.missing("RepoNotFound")

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = [unquote(part[6:]) for part in asked.split("&") if part.startswith("paths=")]
        self.json(self.entries(p for name in names if (p := self.root / name).exists()))

    def file(self, path: Path) -> None:
        if not path.is_file():
            return self.missing("EntryNotFound")
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.reply(200, data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.reply(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A data set on a hub: README, two parquet files, and lines in nested folders. Gives (folder, asked)."""
    root = tmp_path / "words"
    (root / "data").mkdir(parents=True)
    (root / "more" / "deep").mkdir(parents=True)
    (root / "README.md").write_text("# Words")
    for k in range(2):
        table = pa.table({"id": [1, 2], "text": TEXTS[2 * k : 2 * k + 2]})
        pyarrow.parquet.write_table(table, root / "data" / f"train-{k:05d}-of-00002.parquet")
    lines = "".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS).encode()
    (root / "more" / "deep" / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    handler = type("Here", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    constants = "huggingface_hub.constants"  # what HF_ENDPOINT sets when the client is imported
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", endpoint)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    hub.HfFileSystem.clear_instance_cache()
    yield root, handler.asked
    hub.HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_data_set_is_listed_and_streamed(repository, tmp_path):
    root, asked = repository
    inputs, record = find(f"hf:{NAME}", ReadOptions())
    assert [i.name for i in inputs] == [
        "words/data/train-00000-of-00002.parquet",
        "words/data/train-00001-of-00002.parquet",
        "words/more/deep/a.jsonl.zst",
    ]
    assert [i.size for i in inputs] == [(root.parent / i.name).stat().st_size for i in inputs]
    assert record["source"] == f"hf://datasets/{NAME}" and record["files"] == 3
    far = prepare(Request((f"hf:{NAME}",), heldout=0.0), tmp_path / "far").dataset
    near = prepare(
        Request((str(root),), heldout=0.0, include=("*.parquet", "*.zst")), tmp_path / "near"
    ).dataset
    texts = [far.tokenizer.decode(ids) for ids in far.splits["train"]]
    assert texts == TEXTS + [text * 3 for text in TEXTS]
    assert [list(a) for a in far.splits["train"]] == [list(a) for a in near.splits["train"]]
    lines = [(p.path / "sources.jsonl").read_text() for p in (far, near)]
    assert lines[0] == lines[1]  # names, sizes, hashes, counts
    assert any("/resolve/main/" in path for path in asked) and not any("README" in path for path in asked)


def test_a_folder_of_a_hub_data_set(repository):
    inputs, _ = find(f"hf:{NAME}/more", ReadOptions())
    assert [i.name for i in inputs] == ["more/deep/a.jsonl.zst"]


@pytest.mark.parametrize("name", ["hf:lab/nothing", f"hf:{NAME}/nowhere"])
def test_what_the_hub_does_not_have_is_named(repository, name):
    with pytest.raises(DatasetError, match=name.removeprefix("hf:")):
        find(name, ReadOptions())
