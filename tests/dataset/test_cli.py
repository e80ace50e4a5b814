"""The command line: what it prints, and exit code 2 with one clear line for every user error."""

import errno
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest

import dataset
from dataset.__main__ import main
from dataset.files import DatasetError


def run(*argv, capsys):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_prepare_verify_info_decode(corpus, tmp_path, capsys, texts):
    out = tmp_path / "d"
    code, printed, _ = run(
        "prepare", "--source", corpus, "--heldout", 0.1, "--out", out, "--workers", 1, capsys=capsys
    )
    assert code == 0 and "train" in printed and "tokens" in printed
    code, printed, _ = run("verify", out, capsys=capsys)
    assert code == 0 and "0 faults" in printed
    code, printed, _ = run("info", out, "--json", capsys=capsys)
    found = json.loads(printed)
    assert found["vocab"] == 260 and found["splits"]["train"]["samples"]
    assert sum(found["splits"]["train"]["lengths"].values()) == found["splits"]["train"]["documents"]
    assert run("info", out, capsys=capsys)[0] == 0
    code, printed, _ = run("decode", out, "--document", 2, capsys=capsys)
    assert code == 0 and printed in texts
    code, part, _ = run("decode", out, "--document", 2, "--tokens", "0:3", capsys=capsys)
    assert printed.encode().startswith(part.encode()[:3])


def test_verify_names_the_fault_and_exits_2(corpus, tmp_path, capsys):
    out = tmp_path / "d"
    run("prepare", "--source", corpus, "--out", out, "--workers", 1, capsys=capsys)
    path = next((out / "shards").glob("train*.tok"))
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    code, printed, error = run("verify", out, capsys=capsys)
    assert code == 2 and "1 faults" in printed and "block 0" in error.replace("\n", " ")


def test_dry_run_estimates_and_writes_nothing(corpus, tmp_path, capsys):
    code, printed, _ = run("prepare", "--source", corpus, "--out", tmp_path / "d", "--dry-run", capsys=capsys)
    assert code == 0 and "tokens" in printed and not (tmp_path / "d").exists()


def test_dry_run_extrapolates_what_prepare_counts(corpus, tmp_path):
    from dataset.estimate import estimate
    from dataset.plan import Request
    from dataset.prepare import prepare

    request = Request((str(corpus),))
    found, made = estimate(request), prepare(request, tmp_path / "d").dataset
    tokens = sum(s.tokens for s in made.splits.values())
    assert found["documents"] == made.manifest["counts"]["documents"] and found["tokens"] == tokens
    stored = sum(p.stat().st_size for p in (tmp_path / "d" / "shards").iterdir())
    assert found["disk_bytes"] == stored


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.arrow"])
def test_dry_run_of_one_input_larger_than_its_share(tmp_path, monkeypatch, name):
    """The part that is read stands for the rest; where it stops is no damage."""
    from dataset import estimate
    from dataset.plan import Request

    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(4000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith(("parquet", "arrow")):
        table = pyarrow.table({"text": texts})
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file:
            if name == "a.parquet":
                pyarrow.parquet.write_table(table, file)
            else:
                with pyarrow.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=100)
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines, 1) if name.endswith("gz") else lines)
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 1)  # a share is then 1 MiB
    found = estimate.estimate(Request((str(tmp_path / name),)))
    tokens, documents = (len(lines) + 1, 1) if name == "a.txt" else (1001 * 4000, 4000)
    assert found["errors"] == 0 and found["tokens"] == pytest.approx(tokens, rel=0.02)
    assert found["documents"] == pytest.approx(documents, rel=0.02)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "--source", "nowhere", "--out", "{tmp}/o"], "no such file or folder"),
        (["prepare", "--source", "{corpus}", "--out", "{tmp}/o", "--heldout", "2"], "fraction"),
        (
            ["prepare", "--source", "{corpus}", "--out", "{tmp}/o", "--tokenizer", "x.json"],
            "Allowed: 'bytes'",
        ),
        (["prepare", "--source", "{corpus}", "--out", "{corpus}"], "not empty"),
        (["verify", "{tmp}/nothing"], "no dataset here"),
        (["decode", "{data}", "--document", "999999"], "no document 999999"),
        (["decode", "{data}", "--document", "-1"], "no document -1 in 'train'; it has 0.."),
        (["decode", "{data}", "--split", "test"], "no split"),
        (["train-tokenizer", "--source", "{corpus}", "--vocab", "9", "--out", "{tmp}/t"], "allowed are"),
        (
            [
                "train-tokenizer",
                "--source",
                "{corpus}",
                "--vocab",
                "300",
                "--sample-mb",
                "nan",
                "--out",
                "{tmp}/t",
            ],
            "above 0",
        ),
        (["import", "megatron", "{tmp}/m", "--tokenizer", "bytes", "--out", "{tmp}/i"], "no such file"),
        (["export", "megatron", "{data}", "--split", "x", "--out", "{tmp}/e"], "holds no documents"),
    ],
)
def test_user_errors_exit_2_in_one_line(argv, message, corpus, byte_data, tmp_path, capsys):
    filled = [a.format(tmp=tmp_path, corpus=corpus, data=byte_data.path) for a in argv]
    code, _, error = run(*filled, capsys=capsys)
    assert code == 2 and message in error and "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_bad_input_exits_2_and_leaves_what_is_there(corpus, tmp_path, capsys, monkeypatch):
    """Empty corpus, a file that cannot be read, a full disk, an edited manifest, too long a context."""
    out = tmp_path / "d"
    assert run("prepare", "--source", corpus, "--out", out, capsys=capsys)[0] == 0
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "locked.txt").write_text("text")

    def fails(argv, message):
        code, _, error = run(*argv, capsys=capsys)
        assert code == 2 and message in error and "Traceback" not in error
        assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == before

    fails(["prepare", "--source", tmp_path / "empty.txt", "--out", tmp_path / "e"], "not one document")
    fails(["prepare", "--source", tmp_path / "locked.txt", "--out", out], "holds another dataset")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refusing("locked.txt", errno.EACCES))
        fails(["prepare", "--source", tmp_path / "locked.txt", "--out", tmp_path / "l"], "not permitted")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refusing(".tok.", errno.ENOSPC))
        fails(["prepare", "--source", corpus, "--out", tmp_path / "f"], "no space left")
    with pytest.raises(DatasetError, match="fewer than one row of context"):
        dataset.open(out).view(context=10**9)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"eos_id": 256', '"eos_id": 255'))
    before[out / "manifest.json"] = (out / "manifest.json").read_bytes()
    for command in ("info", "verify", "decode"):
        fails([command, out], "edited by hand or damaged")


def refusing(part, number):
    """An `open` that fails with an error number where the path holds `part`."""
    real = open

    def refuse(path, *args, **kwargs):
        if part in str(path):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    return refuse


@pytest.mark.parametrize(
    "argv",
    [
        ["--task", "3/3"],
        ["--task", "x"],
        ["--shard-bytes", "many"],
        ["--shard-bytes", "infG"],
        ["--dtype", "u8"],
        ["--workers", "0", "--dry-run"],
        ["--workers", "-2"],
    ],
)
def test_malformed_options_exit_2(argv, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "--source", str(corpus), "--out", str(tmp_path / "o"), *argv])
    assert stop.value.code == 2


def test_help_of_every_command_has_its_options():
    text = subprocess.run([sys.executable, "-m", "dataset", "--help"], capture_output=True, text=True).stdout
    for command in (
        "prepare",
        "verify",
        "info",
        "decode",
        "import",
        "export",
        "train-tokenizer",
        "score",
        "continue",
    ):
        assert command in text


SPACES = {"type": "Punctuation", "behavior": "Isolated"}


def test_u16_too_small_for_the_vocabulary(corpus, tmp_path, capsys):
    vocab = {f"w{i}" if i else "<eos>": i for i in range(66_000)}
    spec = {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w1"},
        "pre_tokenizer": SPACES,
        "version": "1.0",
    }
    added = {"id": 0, "content": "<eos>", "special": True, "normalized": False, "single_word": False}
    spec["added_tokens"] = [added | {"lstrip": False, "rstrip": False}]
    (tmp_path / "big.json").write_text(json.dumps(spec))
    argv = ["prepare", "--source", corpus, "--out", tmp_path / "o", "--tokenizer", tmp_path / "big.json"]
    code, _, error = run(*argv, "--dtype", "u16", capsys=capsys)
    assert code == 2 and "65,536" in error and "--dtype u32" in error
