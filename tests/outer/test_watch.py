"""Command lines: serve and status HOST:PORT."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.outer.test_async import IDENTITY, SECRET, serving
from tests.outer.test_frames import TERMS, THETA, N
from train import rundir
from train.__main__ import main
from train.outer import watch
from train.outer.client import Link
from train.outer.coordinator import Coordinator

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_says_who_does_what(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        link = Link(at, SECRET, "box-1", 60)
        link.join(TERMS, IDENTITY, THETA)
        lease, _ = link.lease()
        code = server.core.codec.encode(np.ones(N, "float32"))
        link.push(lease.id, 2.0, code, {"loss": 1.25, "tokens_per_s": 1234.0})
        out = io.StringIO()
        Console(file=out, width=140).print(watch.table(at, link.status()))
        link.close()
    text = out.getvalue()
    assert "version 1" in text and "100/200 steps in 2 shards" in text
    assert all(word in text for word in ("box-1", "working", "1,234", "1.2500", "MB"))


def test_status_of_a_server_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
        assert main(["status", at]) == 0
        assert f"{at}  no worker yet" in capsys.readouterr().out
        monkeypatch.setenv("LATENT_LAB_SECRET", "the secret of somebody else")
        assert main(["status", at]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "another secret" in error and "Traceback" not in error
        assert server.core is None


def test_several_are_watched_at_the_pace_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Two servers and a run: all are shown, until the last has ended."""
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "run.json").write_text("{}")
    rundir.set_status(run, "complete", step=9, total=9)
    with serving(tmp_path / "a") as a, serving(tmp_path / "b") as b:
        at = [f"127.0.0.1:{server.address[1]}" for server in (a, b)]
        for server in (a, b):
            server.core = Coordinator(TERMS, THETA)
        pauses = []

        def end(seconds: float) -> None:
            pauses.append(seconds)
            server = (a, b)[len(pauses) - 1]
            server.core.visited = [TERMS.total] * TERMS.shards

        monkeypatch.setattr("train.__main__.time.sleep", end)
        assert main(["status", *at, str(run), "--watch", "0.25"]) == 0
        assert pauses == [0.25, 0.25]
    shown = capsys.readouterr().out
    assert all(where in shown for where in at) and shown.count("200/200 steps") == 2
    assert "9/9" in shown or "0/9" in shown


def test_an_address_is_no_folder(tmp_path: Path) -> None:
    assert watch.is_address("10.0.0.1:29500") and watch.is_address("[::1]:80")
    assert not watch.is_address("runs/x") and not watch.is_address(str(tmp_path))


def test_what_serve_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("LATENT_LAB_SECRET", raising=False)
    assert watch.serve(["--dir", str(tmp_path / "a")]) == 2
    assert "a secret of at least 16 characters" in capsys.readouterr().err
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())
    assert watch.serve(["--dir", str(tmp_path / "a"), "--listen", "here"]) == 2
    assert "want HOST:PORT" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert watch.serve(["--dir", str(tmp_path / "a"), "--listen", f"127.0.0.1:{port}"]) == 2
    assert "cannot listen there" in capsys.readouterr().err


def test_serve_stops_on_sigterm_and_goes_on(tmp_path: Path) -> None:
    """A process of its own: a push, SIGTERM, a second process that knows it."""
    env = {**os.environ, "LATENT_LAB_SECRET": SECRET.decode()}
    words = [sys.executable, "-m", "train.outer.watch", "--dir", str(tmp_path), "--listen", "127.0.0.1:0"]
    for round_ in (1, 2):
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        found = next(m for line in process.stdout if (m := re.search(r"serving on (\S+),", line)))
        link = Link(found[1], SECRET, "w", 60)
        try:
            link.join(TERMS, IDENTITY, THETA)
            lease, theta = link.lease()
            np.testing.assert_allclose(theta[0], THETA[0] if round_ == 1 else THETA[0] - 0.35, rtol=1e-6)
            link.push(lease.id, 1.0, np.full(N, 1.0, "float32").view(np.uint8))
            assert link.status()["version"] == round_
        finally:
            link.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            process.stdout.close()
