"""The command line: what it makes, what it refuses, and that a refusal touches nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.conftest import PRETRAIN, command, environment
from train import checkpoint, rundir
from train.metrics import read
from train.pretrain import main


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def run(*words: object) -> int:
    return main([str(w) for w in words])


def test_a_run_folder_tells_everything(here, data, capsys) -> None:
    assert run("--arch", "tiny.yaml", "--data", data) == 0
    folder = here / "runs" / "tiny"
    about = json.loads((folder / "run.json").read_text())
    assert about["name"] == "tiny" and about["data"]["vocab"] == 260 and about["code"]
    assert about["environment"]["torch"] == torch.__version__
    assert rundir.status_of(folder)["status"] == "complete"
    config = rundir.stored_config(folder)
    assert config.vocab == 260 and config.run.steps == 12
    kinds = [r["kind"] for r in read(folder)]
    assert kinds.count("train") == 4 and kinds.count("eval") == 4 and kinds.count("sample") == 1
    import model

    lm = model.load(folder)
    assert torch.equal(
        lm.state_dict()["embed.weight"], checkpoint.load(checkpoint.saved(folder)[0]).model["embed.weight"]
    )
    shown = capsys.readouterr().out
    assert "bits/byte" in shown and "tok/s" in shown and "MFU" in shown and "ETA" in shown
    before = snapshot(folder)
    assert run("--arch", "tiny.yaml", "--data", data, "--resume") == 0  # complete: nothing to do
    assert "already complete" in capsys.readouterr().out and snapshot(folder) == before


def test_tokens_instead_of_steps_and_one_epoch_by_default(here, data) -> None:
    words = ("--arch", "tiny.yaml", "--data", data, "--set", "run.steps=null")
    assert run(*words, "--set", "run.tokens=1000") == 0
    assert rundir.status_of(here / "runs" / "tiny")["step"] == 8  # 128 tokens a step
    assert run(*words, "--run", "epoch") == 0
    import dataset

    rows = dataset.open(data).view(32).rows
    assert rundir.status_of(here / "epoch")["step"] == -(-rows // 4)


def test_several_stages_in_one_command(here, data, capsys) -> None:
    assert run("--arch", "small1.yaml", "--arch", "small2.yaml", "--data", data, "--run", "both") == 0
    shown = capsys.readouterr().out
    assert "loaded" in shown and "fresh" in shown and "frozen" in shown
    grown = next(r for r in read(here / "both" / "small2") if r.get("event") == "grown")
    assert any(n.startswith("bank.s2") for n in grown["fresh"]) and grown["frozen"]
    start = next(r for r in read(here / "both" / "small2") if r.get("event") == "start")
    assert start["origin"] == rundir.status_of(here / "both" / "small1")["tokens"]


def test_growth_without_its_smaller_stage_names_the_command(here, data, capsys) -> None:
    assert run("--arch", "small2.yaml", "--data", data, "--set", "run.steps=5") == 2
    error = capsys.readouterr().err
    line = f"torchrun train/pretrain.py --arch small1.yaml --data {data} --set run.steps=5"
    assert line in error and not (here / "runs").exists()
    words = line.split()[2:]
    assert main(words) == 0  # the command that was printed does what it says
    assert run("--arch", "small2.yaml", "--data", data, "--set", "run.steps=5") == 0


def test_growth_from_an_unfinished_run_names_the_command(here, data, capsys) -> None:
    assert run("--arch", "small1.yaml", "--data", data) == 0
    rundir.set_status(here / "runs" / "small1", "stopped", step=4)
    assert run("--arch", "small2.yaml", "--data", data) == 2
    assert (
        "--run-dir" in (error := capsys.readouterr().err) and "--resume" in error and "not complete" in error
    )


def test_init_from_takes_the_weights(here, data) -> None:
    assert run("--arch", "tiny.yaml", "--data", data, "--run", "a") == 0
    assert (
        run("--arch", "tiny.yaml", "--data", data, "--run", "b", "--init-from", "a", "--set", "optim.lr=0")
        == 0
    )
    a, b = (checkpoint.load(checkpoint.saved(here / n)[0]).model for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_dry_run_writes_nothing(here, data, capsys) -> None:
    before = snapshot(here)
    assert run("--arch", "tiny.yaml", "--data", data, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "memory" in shown and "12 steps" in shown and "about" in shown
    assert snapshot(here) == before and not (here / "runs").exists()


def test_a_dry_run_takes_one_worker_s_part_of_the_batch(here, data, capsys, monkeypatch) -> None:
    import train.dryrun

    taken, real = [], train.dryrun.train_step

    def counted(state, micros, *rest):
        taken.append(sum(len(m.tokens) for m in micros))
        return real(state, micros, *rest)

    monkeypatch.setattr(train.dryrun, "train_step", counted)
    outer = "outer={kind: async, server: 'localhost:9', shards: 4}"
    assert run("--arch", "tiny.yaml", "--data", data, "--dry-run", "--set", outer) == 0
    assert taken == [1, 1, 1] and "1 rows of 32 tokens" in capsys.readouterr().out


BAD = {
    "misspelt key": (["--set", "run.stepz=3"], "did you mean 'steps'"),
    "unknown arch": (["--arch", "nothing.yaml"], "nothing.yaml"),
    "unknown block": (["--set", "stack.0.of.0=atention"], "did you mean 'attention'"),
    "wrong type": (["--set", "dim=wide"], "want int"),
    "unknown optimizer": (["--set", "optim.name=adamv"], "did you mean 'adamw'"),
    "unknown outer loop": (["--set", "outer.kind=dilocoo"], "did you mean 'diloco'"),
    "both lengths": (["--set", "run.tokens=100"], "not both"),
    "schedule too long": (["--set", "schedule.warmup=100"], "longer than the run"),
    "plateau on a cosine": (["--set", "grow.when=plateau", "--set", "schedule.kind=cosine"], "constant"),
    "other vocabulary": (["--set", "vocab=1000"], "260"),
    "no such run": (["--init-from", "nowhere"], "no such folder"),
    "run folder in use": (["--run", "occupied"], "holds no run"),
    "context longer than the data": (["--set", "run.context=1000000"], "context"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_message(here, data, capsys, case) -> None:
    (here / "occupied").mkdir()
    (here / "occupied" / "thesis.tex").write_text("my own")
    words, expected = BAD[case]
    before = snapshot(here)
    arch = [] if "--arch" in words else ["--arch", "tiny.yaml"]
    assert run(*arch, "--data", data, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and "Traceback" not in error
    assert snapshot(here) == before and not (here / "runs").exists()


def test_missing_dataset_names_the_command(here, capsys) -> None:
    assert run("--arch", "tiny.yaml") == 2
    assert "python -m dataset prepare --source pystdlib" in capsys.readouterr().err
    assert run("--arch", "tiny.yaml", "--data", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_cut_shard_is_refused(here, data, capsys) -> None:
    shutil.copytree(data, here / "cut")
    shard = next((here / "cut" / "shards").glob("train*.tok"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert run("--arch", "tiny.yaml", "--data", "cut") == 2
    assert shard.name in capsys.readouterr().err and not (here / "runs").exists()


def test_another_configuration_or_dataset_is_refused(here, data, text_folder, capsys) -> None:
    assert run("--arch", "tiny.yaml", "--data", data) == 0
    before = snapshot(here / "runs")
    assert run("--arch", "tiny.yaml", "--data", data) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("--arch", "tiny.yaml", "--data", data, "--resume", "--set", "optim.lr=0.5") == 2
    assert "optim.lr: 0.01 in the folder, 0.5 now" in capsys.readouterr().err
    from dataset.plan import Request
    from dataset.prepare import prepare

    prepare(Request(sources=(str(text_folder),), tokenizer="bytes", heldout=0.4), here / "other")
    assert run("--arch", "tiny.yaml", "--data", "other", "--resume") == 2
    assert "was trained on dataset" in capsys.readouterr().err
    assert snapshot(here / "runs") == before
    free = ("--set", "run.log_every=1", "--set", "run.keep=5")  # these change no number of the training
    assert run("--arch", "tiny.yaml", "--data", data, "--resume", *free) == 0


def test_weights_of_another_tokenizer_are_refused(here, data, capsys) -> None:
    assert run("--arch", "tiny.yaml", "--data", data, "--run", "a") == 0
    about = json.loads((here / "a" / "run.json").read_text())
    about["data"]["tokenizer"] = "blake3:other"
    (here / "a" / "run.json").write_text(json.dumps(about))
    assert run("--arch", "tiny.yaml", "--data", data, "--run", "b", "--init-from", "a") == 2
    assert "blake3:other" in capsys.readouterr().err and not (here / "b").exists()


def test_a_smaller_model_that_is_no_prefix_is_refused(here, data, capsys) -> None:
    assert run("--arch", "small1.yaml", "--data", data, "--run", "a") == 0
    words = ("--arch", "small2.yaml", "--data", data, "--run", "b", "--init-from", "a")
    assert run(*words, "--set", "stack.0.onion.s1.to=4") == 2
    assert "prefix" in capsys.readouterr().err and not (here / "b").exists()


def test_a_damaged_only_checkpoint_is_refused(here, data, capsys) -> None:
    assert run("--arch", "small1.yaml", "--data", data, "--run", "runs/a", "--set", "run.keep=0") == 0
    (checkpoint.saved(here / "runs" / "a")[0] / checkpoint.MODEL).write_bytes(b"")
    assert run("--arch", "small1.yaml", "--data", data, "--run", "b", "--init-from", "runs/a") == 2
    assert "damaged" in capsys.readouterr().err and not (here / "b").exists()


def test_full_disk_while_training(here, data, capsys, monkeypatch) -> None:
    real, calls = checkpoint.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:  # the first save succeeds
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run("--arch", "tiny.yaml", "--data", data) == 2
    assert "no space left" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert [p.name for p in checkpoint.saved(here / "runs" / "tiny")] == ["step_00000000"]
    assert run("--arch", "tiny.yaml", "--data", data, "--resume") == 0


def test_training_that_diverges_stops_with_its_own_code(here, data, capsys, monkeypatch) -> None:
    import train.loop

    monkeypatch.setattr(train.loop, "PATIENCE", 3)
    monkeypatch.setattr(train.loop, "clip", lambda params, limit: float("nan"))
    assert run("--arch", "tiny.yaml", "--data", data) == 3
    assert "not finite" in capsys.readouterr().err
    assert rundir.status_of(here / "runs" / "tiny")["status"] == "diverged"
    skips = [r for r in read(here / "runs" / "tiny") if r.get("event") == "skip"]
    assert len(skips) == 2


def test_one_bad_step_is_skipped_and_counted(here, data, monkeypatch) -> None:
    import train.loop

    real, calls = train.loop.clip, []

    def sometimes(params, limit):
        calls.append(1)
        return float("inf") if len(calls) == 4 else real(params, limit)

    monkeypatch.setattr(train.loop, "clip", sometimes)
    assert run("--arch", "tiny.yaml", "--data", data) == 0
    assert [r["skipped"] for r in read(here / "runs" / "tiny") if r["kind"] == "train"] == [0, 1, 1, 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(here, data, number, code) -> None:
    words = [sys.executable, str(PRETRAIN), "--arch", "tiny.yaml", "--data", str(data)]
    words += ["--set", "run.steps=100000", "--set", "run.save_every=0", "--set", "run.eval_every=0"]
    process = subprocess.Popen(
        words, cwd=here, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics = here / "runs" / "tiny" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not (metrics.is_file() and '"train"' in metrics.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, out.decode()
    assert b"go on with --resume" in out and b"Traceback" not in out
    status = rundir.status_of(here / "runs" / "tiny")
    newest = checkpoint.newest(here / "runs" / "tiny")[0]
    assert status["status"] == "stopped" and checkpoint.verify(newest) == status["step"] > 0


def test_two_ranks_equal_one(here, data) -> None:
    """20 fp32 steps at the same global batch, under torchrun on gloo: relative 1e-5."""
    archs = ("tiny", "mixed")
    words: list[object] = ["--data", data, "--set", "run.steps=20", "--set", "optim.lr=1e-3"]
    for arch in archs:
        words += ["--arch", f"{arch}.yaml"]
    assert run(*words, "--run", "one") == 0
    done = command(*words, "--run-dir", "two", cwd=here, ranks=2)
    assert done.returncode == 0, done.stderr
    for arch in archs:
        one, two = (checkpoint.load(checkpoint.saved(here / n / arch)[0]).model for n in ("one", "two"))
        for name, value in one.items():
            error = (two[name] - value).norm() / value.norm().clamp_min(1e-12)
            assert error < 1e-5, (arch, name, float(error))
        logged = [[r["loss"] for r in read(here / n / arch) if r["kind"] == "eval"] for n in ("one", "two")]
        assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_user_errors_under_torchrun_end_every_rank(here, data) -> None:
    done = command("--arch", "tiny.yaml", "--data", data, "--set", "run.batch=3", cwd=here, ranks=2)
    said = re.findall(r"error \(rank (\d)\): run.batch: 3 sequences do not divide among 2 ranks", done.stderr)
    assert done.returncode != 0 and said and len(said) == len(set(said))  # once a rank
    assert done.stderr.count("do not divide among 2 ranks") == len(said)
    assert "exitcode  : 2" in done.stderr and not (here / "runs").exists()


def test_a_second_process_in_the_folder_is_refused(here, data, capsys) -> None:
    (here / "runs" / "tiny").mkdir(parents=True)
    with rundir.locked(here / "runs" / "tiny"):
        assert run("--arch", "tiny.yaml", "--data", data) == 2
    assert "another process" in capsys.readouterr().err
    assert not (here / "runs" / "tiny" / "config.yaml").exists()


def test_a_broken_wandb_costs_the_training_nothing(here, data, monkeypatch) -> None:
    import train.metrics

    monkeypatch.setattr(train.metrics.sys, "executable", "/bin/false")
    assert run("--arch", "tiny.yaml", "--data", data, "--set", "wandb=offline") == 0


def test_status_report_and_evaluate(here, data, capsys) -> None:
    """What is there to look at runs with, on a grown pair; the report needs the records alone."""
    from train.__main__ import main as tools
    from train.evaluate import main as evaluate

    assert run("--arch", "small1.yaml", "--arch", "small2.yaml", "--data", data, "--run", "both") == 0
    capsys.readouterr()
    assert tools(["status", "both"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("complete") == 2 and "8/8" in shown
    assert evaluate(["both/small2", "--tokens", "512", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((here / "both" / "small2" / "evaluation.json").read_text())
    assert set(result["heads"]) == {"recon", "next"} and result["step"] == 8
    logged = [r for r in read(here / "both" / "small2") if r["kind"] == "eval"][-1]
    for head in ("recon", "next"):  # small2 scores 256 tokens while training, and 512 here: near, not equal
        assert result["heads"][head]["nats"] == pytest.approx(logged["losses"][head], rel=0.2)
        ratio = result["heads"][head]["bits_per_byte"] / result["heads"][head]["nats"]
        assert ratio == pytest.approx(1 / math.log(2), rel=0.1)  # bytes, but EOS counts none
    assert [p["beyond"] for p in result["positions"]][-1] is True
    assert result["positions"][0]["first"] == 0 and result["positions"][0]["targets"] > 0
    for name in ("small1", "small2"):
        kept = here / "records" / name
        kept.mkdir(parents=True)
        shutil.copy(here / "both" / name / "metrics.jsonl", kept)
    assert tools(["report", "records/small1", "records/small2", "--out", "page"]) == 0
    page = (here / "page" / "README.md").read_text()
    assert "small1 -> small2" in page and "⟶" in page and "fresh" in page
    for picture in ("losses", "codes", "bits", "speed"):
        assert f"{picture}.png" in page
        assert (here / "page" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    from train.report import History, named

    same = [here / "records" / "small1", here / "both" / "small1"]  # runs of one architecture, laid over
    histories = [History.of(folder) for folder in same]
    assert [h.name for h in histories] == ["small1", "small1"]
    assert [h.name for h in named(histories, same)] == [str(folder) for folder in same]
    for bad in (["status", "nowhere"], ["report", "nowhere"]):
        assert tools(bad) == 2
    assert evaluate(["nowhere"]) == 2 and evaluate(["both/small2", "--data", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err
