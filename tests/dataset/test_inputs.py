"""Every input format gives the same documents; damage is named; other tools' files go in and out."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

import dataset
from dataset import exchange
from dataset.files import DatasetError
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.readers import Damage, Document, read
from dataset.sources import ReadOptions, find
from dataset.tokenizers import make

TEXTS = ["first\nline", "zweiter Text über", "日本語 🙂", "x" * 5000]


def jsonl(texts=TEXTS) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def table():
    return pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))})


def arrow_stream() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)
    return sink.getvalue().to_pybytes()


def arrow_file() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table(), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "a.jsonl.gz": lambda: gzip.compress(jsonl()),
    "a.json.gz": lambda: gzip.compress(jsonl()),
    "a.jsonl.zst": lambda: zstandard.compress(jsonl(TEXTS[:2])) + zstandard.compress(jsonl(TEXTS[2:])),
    "a.jsonl.xz": lambda: lzma.compress(jsonl()),
    "a.jsonl.bz2": lambda: bz2.compress(jsonl()),
    "a.parquet": parquet,
    "data-00000-of-00001.arrow": arrow_stream,
    "b.arrow": arrow_file,
}


def documents(path, **options):
    inputs, _ = find(str(path), ReadOptions(**options))
    return [item for one in inputs for item in read(one, options.get("field", "text"))]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_documents(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    assert [d.text for d in documents(tmp_path / name)] == TEXTS


def test_text_and_code_files_are_documents(tmp_path):
    (tmp_path / "src" / ".git").mkdir(parents=True)
    (tmp_path / "src" / "node_modules").mkdir()
    for name in ("a.py", "b.md", ".git/x", "node_modules/y.js", "settings.json"):
        (tmp_path / "src" / name).write_text(f"# {name}\n")
    (tmp_path / "src" / "c.rst.gz").write_bytes(gzip.compress(b"rst"))
    found = documents(tmp_path / "src")
    assert [d.text for d in found] == ["# a.py\n", "# b.md\n", "rst", "# settings.json\n"]
    assert [d.text for d in documents(tmp_path / "src", include=("*.py",))] == ["# a.py\n"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    for folder in ("far/sub", "src"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "far" / "sub" / "b.txt").write_text("b")
    (tmp_path / "src" / "a.txt").write_text("a")
    (tmp_path / "src" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "src" / "again").symlink_to(tmp_path / "far" / "sub")  # once is enough
    (tmp_path / "far" / "sub" / "back").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "up").symlink_to(tmp_path)
    inputs, _ = find(str(tmp_path / "src"), ReadOptions())
    assert [i.name for i in inputs] == ["src/a.txt", "src/again/b.txt"]


def test_what_cannot_be_listed_or_named_is_refused(tmp_path, monkeypatch):
    (tmp_path / "src" / "locked").mkdir(parents=True)
    (tmp_path / "src" / "a.txt").write_text("a")
    real = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DatasetError, match="locked: not permitted"):
            find(str(tmp_path / "src"), ReadOptions())
    try:
        (tmp_path / "src" / os.fsdecode(b"\xff.txt")).write_text("b")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(DatasetError, match="not UTF-8"):
        find(str(tmp_path / "src"), ReadOptions())


def test_nested_folders_as_dclm_lays_them_out(tmp_path):
    for i in range(2):
        for j in range(2):
            folder = tmp_path / "dclm" / f"global-shard_0{i}_of_10" / f"local-shard_{j}_of_10"
            folder.mkdir(parents=True)
            (folder / "shard_00000000_processed.jsonl.zst").write_bytes(
                zstandard.compress(jsonl([f"{i}{j}"]))
            )
    report = prepare(Request((str(tmp_path / "dclm"),), heldout=0.0), tmp_path / "out")
    data = report.dataset
    assert [data.tokenizer.decode(d) for d in data.splits["train"]] == ["00", "01", "10", "11"]


def test_a_saved_datasets_folder_is_read_without_its_metadata(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "data-00000-of-00001.arrow").write_bytes(arrow_stream())
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    assert [d.text for d in documents(folder)] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet", "b.arrow"])
def test_cut_files_keep_what_came_before_and_report(tmp_path, name):
    many = {"a.jsonl.zst": zstandard.compress(jsonl())}.get(name) or FILES[name]()
    (tmp_path / name).write_bytes(many[: len(many) * 2 // 3])
    found = documents(tmp_path / name)
    assert isinstance(found[-1], Damage) and "further" in found[-1].message
    assert all(isinstance(d, Document) and d.text in TEXTS for d in found[:-1])


@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress)]
)
def test_all_whole_lines_before_a_cut_are_kept(tmp_path, ending, compress):
    """However the libraries buffer: a line is lost only with the bytes it is made of."""
    rng = np.random.default_rng(0)
    texts = [rng.bytes(30).hex() for _ in range(3000)]
    whole = compress(jsonl(texts))
    (tmp_path / f"a.jsonl.{ending}").write_bytes(whole[: len(whole) * 2 // 3])
    *kept, damage = documents(tmp_path / f"a.jsonl.{ending}")
    assert isinstance(damage, Damage) and damage.line == len(kept) + 1
    assert [d.text for d in kept] == texts[: len(kept)] and len(kept) > 1500


def test_an_arrow_stream_cut_anywhere_is_reported(tmp_path):
    """Between two batches too, where pyarrow's reader takes what is there for the whole."""
    whole = arrow_stream()
    for size in range(0, len(whole), 8):
        (tmp_path / "a.arrow").write_bytes(whole[:size])
        *kept, damage = documents(tmp_path / "a.arrow")
        assert isinstance(damage, Damage) and [d.text for d in kept] == TEXTS[: len(kept)], size
    assert len(kept) == len(TEXTS)  # at the last cut the end mark alone is missing


@pytest.mark.parametrize("ending", ["gz", "zst", "xz", "bz2"])
def test_an_archive_of_no_bytes_is_damage(tmp_path, ending):
    for name in (f"a.jsonl.{ending}", f"a.txt.{ending}"):
        (tmp_path / name).write_bytes(b"")
        (found,) = documents(tmp_path / name)
        assert isinstance(found, Damage) and "no bytes" in found.message
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(["a"])) + b"something else")
    assert [type(d) for d in documents(tmp_path / "b.jsonl.zst")] == [Document, Damage]


def test_a_byte_order_mark_costs_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in documents(tmp_path / "a.jsonl")] == ["one", "two"]


def test_missing_column_names_the_columns(tmp_path):
    for name in ("a.parquet", "b.arrow"):
        (tmp_path / name).write_bytes(FILES[name]())
        (found,) = documents(tmp_path / name, field="body")
        assert "no column 'body'; the columns are text, id" in found.message


def test_two_sources_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    names = tuple(str(tmp_path / f / "x.txt") for f in "ab")
    with pytest.raises(DatasetError, match="two inputs are named"):
        prepare(Request(names), tmp_path / "out")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.arrow"])
def test_remote_files_are_streamed(name):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe(f"/bucket/{name}", FILES[name]())
    try:
        assert [d.text for d in documents(f"memory://bucket/{name}")] == TEXTS
        assert [d.text for d in documents("memory://bucket")] == TEXTS
    finally:
        system.rm("/bucket", recursive=True)


def test_a_remote_folder_is_listed_in_name_order(tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("not data")
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "hub" / "data" / name).write_bytes(jsonl([name]))
    url = (tmp_path / "hub").as_uri()
    assert [d.text for d in documents(url)] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DatasetError, match=r"cannot be listed|no jsonl"):
        find("memory://nothing", ReadOptions())


# ----------------------------------------------------------------------------- other tools


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_export_then_import_gives_the_same_ids(byte_data, tmp_path, kind):
    exchange.export_corpus(kind, byte_data, "train", tmp_path / "x")
    source = tmp_path / ("x" if kind == "megatron" else "x.ds")
    data = exchange.import_corpus(kind, [source], make("bytes"), tmp_path / "out")
    ours, theirs = data.splits["train"], byte_data.splits["train"]
    assert ours.documents == theirs.documents and ours.bytes == theirs.bytes
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
    assert dataset.open(tmp_path / "out", check="full").view(context=64).rows
    with pytest.raises(DatasetError, match="exists already"):
        exchange.export_corpus(kind, byte_data, "train", tmp_path / "x")


def test_import_refuses_ids_outside_the_vocabulary_and_cut_files(byte_data, tmp_path):
    exchange.export_corpus("megatron", byte_data, "train", tmp_path / "x")
    exchange.export_corpus("datatrove", byte_data, "train", tmp_path / "x2")
    ids = np.fromfile(tmp_path / "x.bin", "<u2")
    ids[100] = 9999
    ids.tofile(tmp_path / "x.bin")
    with pytest.raises(DatasetError, match="document 0 holds id 9999"):
        exchange.import_corpus("megatron", [tmp_path / "x"], make("bytes"), tmp_path / "o1")
    ids[:-5].tofile(tmp_path / "x.bin")
    with pytest.raises(DatasetError, match="cut off"):
        exchange.import_corpus("megatron", [tmp_path / "x"], make("bytes"), tmp_path / "o2")
    ids[:-5].tofile(tmp_path / "x2.ds")
    with pytest.raises(DatasetError, match="neither 2 nor 4"):
        exchange.import_corpus("datatrove", [tmp_path / "x2.ds"], make("bytes"), tmp_path / "o3")
    (tmp_path / "y.idx").write_bytes(b"something else entirely" * 3)
    with pytest.raises(DatasetError, match="not a Megatron index"):
        exchange.import_corpus("megatron", [tmp_path / "y"], make("bytes"), tmp_path / "o4")


def test_indices_that_are_cut_or_leave_something_out_are_refused(byte_data, tmp_path):
    exchange.export_corpus("megatron", byte_data, "train", tmp_path / "x")
    exchange.export_corpus("datatrove", byte_data, "train", tmp_path / "y")
    index, ends = (tmp_path / "x.idx").read_bytes(), (tmp_path / "y.ds.index").read_bytes()
    n = byte_data.splits["train"].documents
    fewer = index[:26] + (n).to_bytes(8, "little") + index[34:-8]  # the last document is in none

    def refused(kind, name, message):
        with pytest.raises(DatasetError, match=message):
            exchange.import_corpus(kind, [tmp_path / name], make("bytes"), tmp_path / "out")
        assert not (tmp_path / "out").exists()  # so that the next try may have the same --out

    for damaged, message in ((index[:20], "header"), (index[:100], "cut off"), (fewer, "not all of its")):
        (tmp_path / "x.idx").write_bytes(damaged)
        refused("megatron", "x", message)
    for damaged in (ends[:-3], ends[:8] + ends[16:24] + ends[8:]):
        (tmp_path / "y.ds.index").write_bytes(damaged)
        refused("datatrove", "y.ds", "no list of document ends")


def test_import_and_export_refuse_what_they_cannot_do(byte_data, tmp_path):
    exchange.export_corpus("datatrove", byte_data, "train", tmp_path / "y")
    (tmp_path / "file").write_text("mine")
    for out, heldout, message in (("a", 2.0, "fraction"), ("file", 0.0, "a file, or a folder")):
        with pytest.raises(DatasetError, match=message):
            exchange.import_corpus("datatrove", [tmp_path / "y.ds"], make("bytes"), tmp_path / out, heldout)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "a").exists()
    with pytest.raises(DatasetError, match="a prefix of file names"):
        exchange.export_corpus("megatron", byte_data, "train", Path("."))


def test_import_adds_missing_eos_and_holds_out(byte_data, tmp_path):
    lengths = [3, 1, 4]
    np.array([5, 6, 256, 7, 8, 9, 10, 11], "<u2").tofile(tmp_path / "a.ds")
    np.cumsum(lengths).astype("<u8").tofile(tmp_path / "a.ds.index")
    data = exchange.import_corpus("datatrove", [tmp_path / "a.ds"], make("bytes"), tmp_path / "o")
    assert [d.tolist() for d in data.splits["train"]] == [[5, 6, 256], [7, 256], [8, 9, 10, 11, 256]]


def test_megatron_reads_what_we_write(byte_data, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    exchange.export_corpus("megatron", byte_data, "train", tmp_path / "x")
    theirs = indexed.IndexedDataset(str(tmp_path / "x"))
    split = byte_data.splits["train"]
    assert len(theirs) == split.documents
    assert all(np.array_equal(theirs[i], split.document(i)) for i in range(split.documents))
