"""Whole runs under an outer loop: resumed twice in the middle of a round, grown, over gloo, over TCP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model
from model.config import load
from model.schema import ConfigError
from tests.outer.test_async import SECRET, serving, wait_for
from tests.train.conftest import ROOT, Fit, command, data, equal, place, request_of, text_folder
from train import checkpoint, rundir, settings
from train.metrics import read
from train.mirror import flat
from train.outer.coordinator import Coordinator, Worker
from train.outer.layout import fragments
from train.outer.team import PACKAGES
from train.pretrain import main
from train.world import World

__all__ = ["data", "place", "request_of", "text_folder"]
KINDS = {
    "diloco": "outer={kind: diloco, every: 4, codec: e3m0}",
    "streaming": "outer={kind: streaming, every: 4, fragments: 2, overlap: 2, codec: int8}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_twice_in_the_middle_of_rounds(request_of, kind: str) -> None:
    """Steps 5 and 10 lie inside rounds, with a fragment under way; everything comes out bit-equal."""
    whole = Fit(request_of("whole", KINDS[kind]))
    for stop, resume in ((5, False), (10, True)):
        part = Fit(request_of("parts", KINDS[kind], resume=resume), stop_after=stop)
        assert part.state.step == stop
    parts = Fit(request_of("parts", KINDS[kind], resume=True))
    assert parts.finished and equal(whole.tensors(), parts.tensors())
    assert whole.losses() == parts.losses()
    a, b = (f.state.outer.state_dict() for f in (whole, parts))
    assert repr(a) == repr(b)
    plain = Fit(request_of("plain"))
    assert not equal(whole.tensors(), plain.tensors())  # the outer loop did something


@pytest.mark.parametrize("schedule", ["{warmup: 2, decay: 0.2}", "{kind: constant, warmup: 2}"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plateau_ends_a_stage_at_an_exchange_and_survives_a_resume(request_of, kind, schedule) -> None:
    """Any fall below half the loss is flat here: found at step 18, heard of in a later exchange."""
    sets = (KINDS[kind], f"schedule={schedule}", "run.steps=100", "run.eval_every=3", "optim.lr=1e-3")
    sets += ("grow={when: plateau, delta: 0.5, tokens_per_param: 0.02}", "run.save_every=0")
    whole = Fit(request_of("whole", *sets))
    (event,) = (r for r in whole.records if r.get("event") == "plateau")
    end = whole.state.step
    assert event["step"] > 21 and whole.finished and end == whole.state.schedule.total < 40
    assert end > event["step"] if "decay" in schedule else end == event["step"]
    for r in whole.state.outer.replicas:  # the stage ended with an exchange, and nothing is under way
        assert np.array_equal(r.fragment.get(), r.outer)
    assert not getattr(whole.state.outer, "_pending", {})
    for stop, resume in ((21, False), (event["step"], True)):
        Fit(request_of("parts", *sets, resume=resume), stop_after=stop)
    parts = Fit(request_of("parts", *sets, resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()
    assert len([r for r in parts.records if r.get("event") == "plateau"]) == 1


@pytest.mark.slow
def test_two_ranks_are_two_workers_that_end_equal_and_grow(place: Path, data: Path) -> None:
    """torchrun with 2 ranks: two runs, equal parameters at the end of each stage, grown from the same."""
    archs = ["--arch", place / "small1.yaml", "--arch", place / "small2.yaml"]
    sets = ["--set", "outer={kind: diloco, every: 3}", "--data", data, "--run-dir", place / "out"]
    done = command(*archs, *sets, cwd=place, ranks=2)
    assert done.returncode == 0, done.stderr
    for stage in ("small1", "small2"):
        folders = [place / "out" / stage, place / "out" / stage / "workers" / "1"]
        ends = [checkpoint.load(checkpoint.saved(f)[0]).model for f in folders]
        assert equal(*ends)
        losses = [(f / "metrics.jsonl").read_text() for f in folders]
        assert losses[0] != losses[1]  # they saw different data
    last = [json.loads(x) for x in losses[0].splitlines() if '"train"' in x][-1]
    frozen = checkpoint.load(checkpoint.saved(place / "out" / "small2")[0])
    trained = sum(r["outer"].numel() for r in frozen.train["outer"]["ranks"][0]["replicas"])
    everything = sum(t.numel() for t in frozen.model.values())
    assert trained < everything  # the frozen shell stays at home
    # Rounds at steps 3, 6 and at the end, 8: each sends 2 (k-1)/k * 4P = 4P.
    assert last["outer"]["rounds"] == 3 and last["outer"]["sent"] == 3 * 4 * (trained + trained % 2)


@pytest.mark.slow
def test_two_ranks_resume_from_what_both_have_or_not_at_all(place: Path, data: Path) -> None:
    """ranks: a worker that fell behind takes the other along; one that lost its folder stops both."""
    sets = ["--set", "outer={kind: diloco, every: 3}", "--set", "run.keep=9"]
    words = ["--arch", place / "tiny.yaml", "--data", data, "--run-dir", place / "out", *sets]
    done = command(*words, cwd=place, ranks=2)
    assert done.returncode == 0, done.stderr
    folders = [place / "out", place / "out" / "workers" / "1"]
    ends = [checkpoint.load(checkpoint.saved(f)[0]).model for f in folders]
    folders[1].rename(place / "lost")
    for path in checkpoint.saved(place / "lost"):
        if path.name > "step_00000004":
            shutil.rmtree(path)
    rundir.set_status(place / "lost", "stopped", step=4)
    before = {p: p.read_bytes() for p in folders[0].rglob("*") if p.is_file()}
    refused = command(*words, "--resume", cwd=place, ranks=2)
    assert "no checkpoint that every rank has" in refused.stderr and refused.returncode
    assert {p: p.read_bytes() for p in folders[0].rglob("*") if p.is_file()} == before
    assert not folders[1].exists()
    (place / "lost").rename(folders[1])
    done = command(*words, "--resume", cwd=place, ranks=2)
    assert done.returncode == 0, done.stderr
    for folder, end in zip(folders, ends):
        assert equal(checkpoint.load(checkpoint.saved(folder)[0]).model, end)
    assert checkpoint.saved(folders[0])[0].with_suffix(".aside0").is_dir()


def copied(folder: Path) -> Path:
    """pretrain.py beside a copy of the packages: all processes of a test run the same code, whoever edits."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "train" / "pretrain.py"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, the server in this process judges no push after the 15th version."""
    opened, whole = threading.Event(), Coordinator.push

    def push(self: Coordinator, *args: Any) -> str:
        assert self.version < 15 or opened.wait(3600)
        return whole(self, *args)

    monkeypatch.setattr(Coordinator, "push", push)
    return opened


@pytest.mark.slow
def test_a_worker_over_tcp_is_killed_and_comes_back(
    place: Path, data: Path, tmp_path: Path, gate: threading.Event
) -> None:
    """kill -9 in the middle of training, resumed: the run ends, every shard has its steps, no push twice."""
    env = {**os.environ, "LATENT_LAB_SECRET": SECRET.decode(), "OMP_NUM_THREADS": "1"}
    with serving(tmp_path / "server") as server:
        outer = f"outer={{kind: async, every: 3, server: '127.0.0.1:{server.address[1]}', heartbeat: 600.0}}"
        words = [sys.executable, str(copied(tmp_path / "code")), "--arch", str(place / "tiny.yaml")]
        words += ["--data", str(data), "--run", str(place / "w"), "--set", outer, "--set", "run.steps=100"]
        words += ["--set", "run.save_every=5", "--set", "run.eval_every=0"]
        process = subprocess.Popen(words, cwd=place, env=env, stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 3600
            while server.core is None or server.core.version < 8:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
            gate.set()
        again = subprocess.run([*words, "--resume"], cwd=place, env=env, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert "resumed at step" in again.stdout
        core = server.core
        assert core.done and core.visited == [100]
        (w,) = core.workers.values()
        assert w.steps == 100 and core.version == w.counts["applied"]  # each step once
    trained = np.concatenate([f.get() for f in fragments(model.load(place / "w"))])
    assert np.array_equal(trained, core.theta)  # the worker ended with what the server holds


def worker(place: Path, data: Path, server: Any, every: int) -> list[str]:
    """The words of an async worker of that server, in the folder `w`."""
    outer = f"{{kind: async, every: {every}, server: '127.0.0.1:{server.address[1]}', heartbeat: 600.0}}"
    words = ["--arch", str(place / "tiny.yaml"), "--data", str(data), "--run", str(place / "w")]
    return [*words, "--set", f"outer={outer}"]


def test_a_worker_that_comes_back_after_the_end_keeps_the_last_parameters(
    place: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no step to do, so its newest checkpoint has the step of the one to be saved."""
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
    with serving(tmp_path / "server") as server:
        words = worker(place, data, server, every=6)
        assert main(words) == 0
        rundir.set_status(place / "w", "stopped", step=12, total=12)
        server.core.theta = server.core.theta + 1  # what others did in the meantime
        assert main([*words, "--resume"]) == 0
        ours = np.concatenate([f.get() for f in fragments(model.load(place / "w"))])
        assert np.array_equal(ours, server.core.theta)
    assert rundir.status_of(place / "w")["status"] == "complete"


def test_a_worker_records_what_became_of_its_pushes(
    place: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version, staleness and verdicts stand in its own records, as numbers, so wandb has them too."""
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
    with serving(tmp_path / "server") as server:
        words = worker(place, data, server, every=3)
        assert main(words) == 0
    sent = [flat(r) for r in read(place / "w") if r["kind"] == "train"]
    keys = ("outer/version", "outer/staleness", "outer/applied")
    assert [tuple(r[k] for k in keys) for r in sent] == [(n, 0, n) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("idle_from", [0, 1])
def test_a_worker_without_work_stops_when_told_to(
    place: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_from: int
) -> None:
    """SIGTERM while it waits for its first lease, or for its second: saved, and it goes on with --resume."""
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
    monkeypatch.setattr("train.outer.server.POLL_S", 0.05)
    dispatch = Coordinator._dispatch

    def none_left(self: Coordinator, w: Worker) -> None:
        if self.leases < idle_from:
            dispatch(self, w)

    with serving(tmp_path / "server") as server, monkeypatch.context() as busy:
        busy.setattr(Coordinator, "_dispatch", none_left)
        outer = f"outer={{kind: async, every: 5, server: '127.0.0.1:{server.address[1]}', heartbeat: 600.0}}"
        words = ["--arch", str(place / "tiny.yaml"), "--data", str(data), "--run", str(place / "w")]
        words += ["--set", outer]

        def terminate() -> None:
            wait_for(lambda: server.core and server.core.version == idle_from and server.core.workers)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=terminate).start()
        assert main(words) == 128 + signal.SIGTERM
        assert rundir.status_of(place / "w")["step"] == 5 * idle_from
        busy.undo()
        assert main([*words, "--resume"]) == 0
        assert server.core.done and server.core.visited == [12]


def test_user_errors_end_with_2(place: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
    sets = "outer={kind: async, server: '127.0.0.1:9', patience: 0.2}"
    words = ["--arch", str(place / "tiny.yaml"), "--data", str(data), "--run", str(place / "x"), "--set"]
    assert main([*words, sets]) == 2
    monkeypatch.delenv("LATENT_LAB_SECRET")
    assert main([*words, sets, "--resume"]) == 2


@pytest.mark.slow
def test_a_worker_of_two_sharded_ranks_is_a_worker(place: Path, data: Path) -> None:
    """outer.workers: 1 on two FSDP2 ranks, stopped by nothing: the same as one process, and resumable."""
    sets = ["--data", data, "--set", "outer={kind: diloco, every: 4, workers: 1}"]
    ends = {}
    for name, ranks, more in (("one", 0, []), ("two", 2, ["--set", "run.parallel=fsdp2"])):
        words = ["--arch", place / "tiny.yaml", *sets, *more, "--run-dir", place / name]
        done = command(*words, cwd=place, ranks=ranks)
        assert done.returncode == 0, done.stderr
        ends[name] = checkpoint.load(checkpoint.saved(place / name)[0])
    for n, t in ends["one"].model.items():
        torch.testing.assert_close(ends["two"].model[n], t, rtol=0, atol=1e-5, msg=n)
    assert len(ends["two"].train["outer"]["ranks"]) == 2
    halves = [r["replicas"][0]["outer"].numel() for r in ends["two"].train["outer"]["ranks"]]
    whole = ends["one"].train["outer"]["ranks"][0]["replicas"][0]["outer"].numel()
    assert sum(halves) == whole and max(halves) < whole  # each rank keeps the outer state of its part


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "hybrid"])
def test_a_sharded_worker_cannot_speak_with_the_server(place: Path, parallel: str) -> None:
    """Rank 0 would push its shard, and take another worker's for the whole."""
    outer = "outer={kind: async, server: '127.0.0.1:9'}"
    config = load(str(place / "tiny.yaml"), [outer, f"run.parallel={parallel}"])
    settings.check(config, World())
    if parallel == "ddp":
        settings.check(config, World(0, 2))
    else:
        with pytest.raises(ConfigError, match=rf"tiny: run.parallel: {parallel}: .*only its shard"):
            settings.check(config, World(0, 2))
