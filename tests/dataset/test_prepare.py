"""Preparation: the same bytes at any worker count and after any kill; nothing lost, nothing overwritten."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dataset
from dataset import files, plan, writer
from dataset.files import DatasetError
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.work import How


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def many_tasks(monkeypatch):
    """Tasks of at most 2 KiB, so that a small corpus has many."""
    monkeypatch.setattr(plan, "MIN_TASK", 2048)


def test_decoded_documents_are_the_texts(byte_data, texts):
    split = byte_data.splits
    got = [byte_data.tokenizer.decode(ids) for name in ("train", "heldout") for ids in split[name]]
    assert sorted(got) == sorted(texts)
    assert all(ids[-1] == byte_data.eos_id for ids in split["train"])
    assert 5 <= split["heldout"].documents <= 40


def test_shards_are_cut_at_document_ends(byte_data):
    assert len(byte_data.splits["train"].shards) > 5
    for shard in byte_data.splits["train"].shards:
        assert shard.tok.nbytes <= 8192 or shard.documents == 1
        assert shard.tok[-1] == byte_data.eos_id


def test_long_documents_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BUFFER_IDS", 1000)
    shards = writer.ShardWriter(tmp_path, "train-000000", "u16")
    for _ in range(20):
        shards.add(np.zeros(300, np.uint16), 299)
        assert sum(map(len, shards._pending["tok"])) < 1000
    (entry,) = shards.close()
    assert entry["tokens"] == 6000 and (tmp_path / "train-000000-000.tok").stat().st_size == 12000


def test_lengths_past_32_bits_are_refused_and_never_reached(tmp_path):
    shards = writer.ShardWriter(tmp_path, "train-000000", "u16", shard_bytes=8 * 2**30)
    with pytest.raises(DatasetError, match="4,294,967,296 ids"):
        shards.add(np.broadcast_to(np.uint16(7), 2**32), 2**32)
    assert shards._limit < 2**32  # of .tok alone 8 GiB would be 2^32 ids


def test_copies_of_a_document_stay_in_one_split(tmp_path):
    text = "".join(json.dumps({"text": f"document {i % 50}"}) + "\n" for i in range(200))
    (tmp_path / "a.jsonl").write_text(text)
    data = prepare(Request((str(tmp_path / "a.jsonl"),), heldout=0.3), tmp_path / "out").dataset
    train, held = ({data.tokenizer.decode(i) for i in data.splits[s]} for s in ("train", "heldout"))
    assert train and held and not train & held


def test_one_two_and_five_workers_and_tasks_agree(corpus, tmp_path, many_tasks):
    request = Request((str(corpus),), heldout=0.1, shard_bytes=8192)
    wanted = contents(prepare(request, tmp_path / "w1", workers=1).dataset.path)
    for workers in (2, 5):
        assert contents(prepare(request, tmp_path / f"w{workers}", workers=workers).dataset.path) == wanted
    for i in (2, 0, 1):
        report = prepare(request, tmp_path / "tasks", task=(i, 3))
        assert report.dataset is None and not (tmp_path / "tasks" / "manifest.json").exists()
    assert report.done == report.tasks > 3
    assert contents(prepare(request, tmp_path / "tasks").dataset.path) == wanted


def test_file_order_is_that_of_names_not_of_the_folder(tmp_path):
    for folder, order in (("a", "xyz"), ("b", "zyx")):
        (tmp_path / folder / "src").mkdir(parents=True)
        for name in order:
            (tmp_path / folder / "src" / f"{name}.txt").write_text(f"text {name}")
    made = [prepare(Request((str(tmp_path / f / "src"),)), tmp_path / f / "out").dataset for f in "ab"]
    assert made[0].id == made[1].id
    assert not any(str(tmp_path).encode() in data for data in contents(made[0].path).values())


SCRIPT = """
import sys
from pathlib import Path
from dataset import plan
plan.MIN_TASK = 2048
from dataset.plan import Request
from dataset.prepare import prepare
if __name__ == "__main__":
    request = Request((sys.argv[1],), heldout=0.1, shard_bytes=8192)
    prepare(request, Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


def kill_and_restart(corpus, tmp_path, kills, workers, longest) -> int:
    """kill -9 the process group at `kills` moments spread over a whole run; finish; compare."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    request = Request((str(corpus),), heldout=0.1, shard_bytes=8192)
    wanted = contents(prepare(request, tmp_path / "clean").dataset.path)
    rng = np.random.default_rng(0)
    hit = 0
    for k in range(kills):
        out = tmp_path / f"out{k}"
        for _ in range(2):  # killed once, and again on its way back
            process = subprocess.Popen(
                [sys.executable, str(script), str(corpus), str(out), str(workers)], start_new_session=True
            )
            deadline = time.monotonic() + 60
            while not out.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, longest))
            if process.poll() is None:
                hit += 1
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not (out / "manifest.json").exists():
                with pytest.raises(DatasetError):
                    dataset.open(out)
        if k % 2:  # half of them are finished at another worker count
            prepare(request, out)
        else:
            subprocess.run([sys.executable, str(script), str(corpus), str(out), "2"], check=True)
        assert contents(out) == wanted, f"kill {k}"
        shutil.rmtree(out)
    return hit


@pytest.mark.skipif(os.name == "nt", reason="kills a process group")
def test_killed_preparation_goes_on(corpus, tmp_path, many_tasks):
    assert kill_and_restart(corpus, tmp_path, kills=2, workers=1, longest=0.15) >= 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills a process group")
def test_dataset_killed_at_50_moments(corpus, tmp_path, many_tasks):
    hit = kill_and_restart(corpus, tmp_path, kills=25, workers=1, longest=0.25)
    (tmp_path / "two").mkdir()
    hit += kill_and_restart(corpus, tmp_path / "two", kills=25, workers=2, longest=3.0)
    assert hit >= 50


def test_same_request_again_is_a_no_op_and_another_is_refused(byte_data, corpus):
    before = contents(byte_data.path)
    request = Request((str(corpus),), heldout=0.1, shard_bytes=8192)
    assert prepare(request, byte_data.path).reused
    with pytest.raises(DatasetError, match="another dataset"):
        prepare(Request((str(corpus),), heldout=0.2), byte_data.path)
    assert {k: v for k, v in contents(byte_data.path).items() if not k.startswith(".")} == {
        k: v for k, v in before.items() if not k.startswith(".")
    }


def test_foreign_and_unfinished_folders_are_refused(corpus, tmp_path, many_tasks):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DatasetError, match="not empty"):
        prepare(Request((str(corpus),)), tmp_path / "mine")
    prepare(Request((str(corpus),)), tmp_path / "half", task=(0, 2))
    with pytest.raises(DatasetError, match="not finished"):
        dataset.open(tmp_path / "half")
    with pytest.raises(DatasetError, match="other inputs or options"):
        prepare(Request((str(corpus),), heldout=0.5), tmp_path / "half")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_tasks_that_start_together_do_not_refuse_each_other(corpus, tmp_path, monkeypatch, many_tasks):
    """Another task claims the folder and makes its own in it between any two looks of this one."""
    request, out, real = Request((str(corpus),)), tmp_path / "out", Path.exists
    met = []

    def exists(path, **options):
        found = real(path, **options)
        if path.name == "plan.json" and not met:
            met.append(path)
            prepare(request, out, task=(1, 2))
        return found

    monkeypatch.setattr(Path, "exists", exists)
    prepare(request, out, task=(0, 2))
    assert met and prepare(request, out).dataset


def test_full_disk_keeps_what_was_done(corpus, tmp_path, many_tasks, monkeypatch):
    request = Request((str(corpus),), heldout=0.1)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DatasetError, match="no space left"):
        prepare(request, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(f"*{files.TEMPORARY}"))
    assert list((tmp_path / "out").rglob("receipts/*.json"))
    monkeypatch.setattr(os, "fsync", real)
    wanted = prepare(request, tmp_path / "clean").dataset
    assert prepare(request, tmp_path / "out").dataset.id == wanted.id


def test_errors_are_counted_with_file_and_line(tmp_path):
    lines = ['{"text": "one"}', "{broken", '{"body": 1}', '["list"]', '{"text": ""}', "", '{"text": "two"}']
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "in" / "b.txt").write_bytes(b"good\nline\n\xff\xfe bad")
    (tmp_path / "in" / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / "in" / "d.jsonl").write_text('{"text": "half \\ud800 surrogate"}')
    request = Request((str(tmp_path / "in"),), heldout=0.0)
    report = prepare(request, tmp_path / "out")
    assert report.counts["errors"] == 6 and report.counts["empty"] == 1 and report.counts["documents"] == 2
    found = "\n".join(report.messages)
    for place in (
        "in/a.jsonl:2: not JSON",
        "in/a.jsonl:3: no text in field 'text'",
        "in/a.jsonl:4: not an object",
    ):
        assert place in found
    assert "in/b.txt:3: not UTF-8" in found and "in/c.bin:1: binary" in found and "in/d.jsonl:1" in found
    recorded = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").read_text().splitlines()]
    assert [r.get("errors", 0) for r in recorded] == [3, 1, 1, 1]
    with pytest.raises(DatasetError, match=r"in/a\.jsonl:2: .*--strict"):
        prepare(request, tmp_path / "strict", how=How(strict=True))


def test_lines_that_only_the_lenient_reader_takes(tmp_path):
    """NaN and long integers are read as ever; a line nested too deep costs that line alone."""
    lines = ['{"n": NaN, "text": "a"}', "[" * 5000, '{"n": 1%s, "text": "b"}' % ("0" * 400), '{"text": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = prepare(Request((str(tmp_path / "a.jsonl"),), heldout=0.0), tmp_path / "out")
    data = report.dataset
    assert [data.tokenizer.decode(ids) for ids in data.splits["train"]] == ["a", "b", "c"]
    (message,) = report.messages
    assert message.startswith("a.jsonl:2: not JSON")


def test_a_corpus_without_documents_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DatasetError, match="not one document"):
        prepare(Request((str(tmp_path / "empty.txt"),)), tmp_path / "out")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(
        DatasetError, match=r"1 could not be read.*The first error: broken\.jsonl:1: not JSON"
    ):
        prepare(Request((str(tmp_path / "broken.jsonl"),)), tmp_path / "out")
    (tmp_path / "good.txt").write_text("text")
    assert prepare(Request((str(tmp_path / "good.txt"),), heldout=0.0), tmp_path / "out").dataset.id
    (tmp_path / "none").mkdir()
    with pytest.raises(DatasetError, match="no files"):
        prepare(Request((str(tmp_path / "none"),)), tmp_path / "out2")


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    real = open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("a.txt"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DatasetError, match=r"a\.txt: not permitted"):
        prepare(Request((str(tmp_path / "a.txt"),)), tmp_path / "out")


def test_length_limits_drop_and_count(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 11)))
    request = Request((str(tmp_path / "a.jsonl"),), heldout=0.0, min_tokens=4, max_tokens=8)
    report = prepare(request, tmp_path / "out")
    assert report.counts["documents"] == 5 and report.counts["dropped_by_length"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout": 1.0}, "fraction"),
        ({"dtype": "u8"}, "u16, u32"),
        ({"shard_bytes": 10}, "1 KiB"),
        ({"merges": 5}, "no merges"),
        ({"tokenizer": "nowhere.json"}, "no such file or folder"),
        ({"sources": ("nowhere",)}, "no such file or folder"),
    ],
)
def test_bad_requests_say_what_is_allowed(corpus, tmp_path, change, message):
    request = Request(**({"sources": (str(corpus),)} | change))
    with pytest.raises(DatasetError, match=message):
        prepare(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()
