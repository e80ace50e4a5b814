"""`make test-slow AREA=faults`: real processes on a LAN of namespaces, killed, cut off and slowed down.

Five nodes at 100 Mbit and 5 ms: the server on n0, workers on the others. In every drill each step of each
shard must be applied exactly once, and the final loss must lie within the noise of undisturbed runs.
FAULT_KILLS: kills of the soak (default 50).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.lan import Lan, missing
from tests.cluster.worker import HEARTBEAT, LR, C, D, gradient, held_out, rows, terms
from train.outer.coordinator import Coordinator, Lease
from train.outer.journal import Journal
from train.outer.simulate import simulate

ROOT = Path(__file__).resolve().parents[2]
WHY = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]
PORT = 29500
SECRET = "drill secret of some length"
EVERY, PACE = 10, 0.02


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    with Lan(5, tmp_path_factory.mktemp("lan"), mbit=100, delay=5) as made:
        yield made


class Drill:
    """One training over the LAN: a server, workers by node, and what became of them."""

    def __init__(self, lan: Lan, folder: Path, steps: int = 80, shards: int = 3, seed: int = 0) -> None:
        self.lan, self.folder, self.steps, self.shards, self.seed = lan, folder, steps, shards, seed
        self.address = f"{lan.address(0)}:{PORT}"
        self.env = {
            **os.environ,
            "LATENT_LAB_SECRET": SECRET,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.running: dict[str, subprocess.Popen[Any]] = {}
        self.words: dict[str, list[str]] = {}
        self.began = time.monotonic()

    def serve(self, mortal: tuple[int, str] | None = None) -> None:
        options = ["--dir", str(self.folder / "server"), "--listen", self.address, "--snapshot-every", "20"]
        module = ["-m", "train.outer.watch"]  # what `-m train serve` runs, without the imports of training
        if mortal is not None:
            module = ["-m", "tests.cluster.mortal_server", *map(str, mortal)]
        self._start("n0", [sys.executable, *module, *options])

    def work(self, i: int, pace: float = PACE, fault: str = "") -> None:
        settings = [self.address, f"w{i}", str(self.steps), str(self.shards), str(EVERY), str(pace)]
        extra = [fault] if fault else []
        self._start(
            f"n{i}", [sys.executable, "-m", "tests.cluster.worker", *settings, str(self.seed), *extra]
        )

    def _start(self, node: str, words: list[str]) -> None:
        self.words[node] = words
        log = open(self.folder / f"{node}.log", "ab")  # noqa: SIM115
        options = {"cwd": ROOT, "env": self.env, "stdout": log, "stderr": log}
        self.running[node] = self.lan.popen(node, words, **options)
        log.close()

    def kill(self, node: str) -> None:
        self.running[node].send_signal(signal.SIGKILL)
        self.running[node].wait()

    def revive(self, node: str) -> None:
        self._start(node, self.words[node])

    def version(self) -> int:
        """Of the last line in the server's records."""
        path = self.folder / "server" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["version"] for line in lines[-3:] if line.endswith("}")), default=0)

    def until(self, version: int, limit: float = 90) -> None:
        end = time.monotonic() + limit
        while self.version() < version:
            assert time.monotonic() < end, f"version {self.version()}, wanted {version}\n{self.logs()}"
            time.sleep(0.02)

    def finish(self, limit: float = 120) -> Coordinator:
        """Wait for all workers, stop the server, and read what it holds. Every step was applied once."""
        end = time.monotonic() + limit
        for node, process in self.running.items():
            if node != "n0":
                process.wait(max(1.0, end - time.monotonic()))
                assert process.returncode == 0, f"{node}: exit code {process.returncode}\n{self.logs()}"
        self.running["n0"].send_signal(signal.SIGTERM)
        assert self.running["n0"].wait(20) == 0, self.logs()
        journal = Journal(self.folder / "server")
        found = journal.recover()
        journal.close()
        assert found is not None
        core = Coordinator.restore(found[0]["core"], found[1])
        assert core.done and core.visited == [self.steps] * self.shards
        assert sum(w.steps for w in core.workers.values()) == self.steps * self.shards  # each exactly once
        assert core.version == sum(w.counts.get("applied", 0) for w in core.workers.values())
        return core

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log")))

    def gaps(self, worker: str) -> list[float]:
        """Seconds between a worker's pushes, by the server's clock."""
        lines = map(json.loads, (self.folder / "server" / "metrics.jsonl").read_text().splitlines())
        times = [x["time"] for x in lines if x["kind"] == "push" and x["worker"] == worker]
        return [b - a for a, b in itertools.pairwise(times)]


def report(name: str, drill: Drill, core: Coordinator, **more: Any) -> float:
    loss = held_out(core.theta)
    counts = {n: w.counts for n, w in core.workers.items()}
    seconds = round(time.monotonic() - drill.began, 1)
    print(f"{name}: loss {loss:.4f}, {seconds} s, version {core.version}, {counts}, {more}")
    return loss


@pytest.fixture(scope="module")
def noise(lan: Lan, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """Mean of the final loss of undisturbed runs over seeds, and what counts as noise around it."""
    losses = []
    for seed in range(3):
        drill = Drill(lan, tmp_path_factory.mktemp(f"calm{seed}"), seed=seed)
        drill.serve()
        for i in (1, 2, 3):
            drill.work(i)
        losses.append(report(f"undisturbed, seed {seed}", drill, drill.finish()))
    return float(np.mean(losses)), 4 * float(np.std(losses, ddof=1)) + 0.01


def within(loss: float, noise: tuple[float, float]) -> None:
    assert abs(loss - noise[0]) <= noise[1], f"loss {loss}, undisturbed {noise[0]} ± {noise[1]}"


def nobody_waited(drill: Drill, workers: list[int]) -> float:
    """Others stall at most twice the heartbeat limit (beyond a usual round)."""
    worst = 0.0
    for i in workers:
        gaps = drill.gaps(f"w{i}")
        worst = max(worst, max(gaps) - float(np.median(gaps)))
    assert worst <= 2 * HEARTBEAT, f"a stall of {worst:.2f} s"
    return worst


@pytest.mark.parametrize("fault", ["inner", "send:2", "receive:3"])
def test_faults_worker_killed(lan: Lan, tmp_path: Path, noise: tuple[float, float], fault: str) -> None:
    drill = Drill(lan, tmp_path)
    drill.serve()
    for i in (1, 2, 3):
        drill.work(i, fault=fault if i == 1 and fault != "inner" else "")
    if fault == "inner":
        drill.until(4)
        drill.kill("n1")
    else:
        assert drill.running["n1"].wait(60) == -signal.SIGKILL
    drill.words["n1"] = [*drill.words["n2"][:4], "w1", *drill.words["n2"][5:]]
    drill.revive("n1")
    core = drill.finish()
    within(report(f"worker killed, {fault}", drill, core, stall=nobody_waited(drill, [2, 3])), noise)


@pytest.mark.parametrize("when", ["before", "after"])
def test_faults_server_killed_mid_apply(
    lan: Lan, tmp_path: Path, noise: tuple[float, float], when: str
) -> None:
    drill = Drill(lan, tmp_path)
    drill.serve(mortal=(6, when))
    for i in (1, 2, 3):
        drill.work(i)
    assert drill.running["n0"].wait(60) == -signal.SIGKILL
    drill.serve()
    within(report(f"server killed {when} apply", drill, drill.finish()), noise)


def test_faults_power_off_and_cable(lan: Lan, tmp_path: Path, noise: tuple[float, float]) -> None:
    """w1's machine loses power for good; w2's cable is out for three heartbeats and comes back."""
    drill = Drill(lan, tmp_path)
    drill.serve()
    for i in (1, 2, 3, 4):
        drill.work(i)
    drill.until(3)
    lan.cut("n1")
    drill.kill("n1")
    del drill.running["n1"]
    lan.cut("n2")
    time.sleep(3 * HEARTBEAT)
    lan.heal("n2")
    core = drill.finish()
    lan.heal("n1")
    stall = nobody_waited(drill, [i for i in (3, 4) if len(drill.gaps(f"w{i}")) > 3])
    within(report("power off and cable cut", drill, core, stall=stall), noise)


def test_faults_slow_worker(lan: Lan, tmp_path: Path) -> None:
    """A worker 4x slower gets fewer steps, and the others do not wait for it."""
    drill = Drill(lan, tmp_path, steps=200, shards=6)  # long enough for any start, and no worker without work
    drill.serve()
    for i in (1, 2, 3):
        drill.work(i, pace=PACE * (4 if i == 1 else 1))
    core = drill.finish()
    steps = {n: w.steps for n, w in core.workers.items()}
    assert steps["w1"] < 0.8 * min(steps["w2"], steps["w3"])
    loss = report("slow worker", drill, core, steps=steps, stall=nobody_waited(drill, [2, 3]))
    within(loss, calm(200, 6, paces=(4.0, 1.0, 1.0)))


def test_faults_bytes_on_the_interface(lan: Lan, tmp_path: Path) -> None:
    """What the application counts and what the interface counts agree, headers of packets aside."""
    drill = Drill(lan, tmp_path, steps=200, shards=1)
    before = lan.counters("n1")
    drill.serve()
    drill.work(1, pace=0.0)
    drill.finish()
    after = lan.counters("n1")
    line = (tmp_path / "n1.log").read_text().split()
    counted = int(line[1]), int(line[3])
    wire = [b - a for a, b in zip(before, after)]
    ratios = [w / c for w, c in zip(wire, counted)]
    print(f"bytes sent, received: application {counted}, interface {wire}, ratios {ratios}")
    assert all(abs(r - 1) <= 0.02 for r in ratios)


def calm(steps: int, shards: int, paces: Sequence[float] = ()) -> tuple[float, float]:
    """The loss of undisturbed workers on a virtual clock: mean over four sets of speeds, and its noise.

    paces: of the workers, relative; none: one worker a shard, all alike.
    """
    paces = paces or (1.0,) * shards
    losses = []
    for seed in range(4):
        core = Coordinator(terms(steps, shards, EVERY), np.zeros(D * C, "float32"))

        def train(name: str, theta: np.ndarray, lease: Lease) -> np.ndarray:
            for i in range(lease.steps):
                theta -= LR * gradient(theta, *rows(0, lease.shard, lease.first + i))[1]
            return theta

        simulate(core, {f"w{i}": p * (1 + 0.1 * ((i + seed) % 4)) for i, p in enumerate(paces)}, train)
        losses.append(held_out(core.theta))
    return float(np.mean(losses)), 4 * float(np.std(losses, ddof=1)) + 0.01


def test_faults_soak(lan: Lan, tmp_path: Path) -> None:
    """Random SIGKILLs of workers and of the server, each restarted at once; nothing lost, nothing twice."""
    kills, rng = int(os.environ.get("FAULT_KILLS", "50")), random.Random(0)
    drill = Drill(lan, tmp_path, steps=40 * kills, shards=4)
    drill.serve()
    for i in (1, 2, 3, 4):
        drill.work(i)
    drill.until(2)
    done: dict[str, int] = {}
    for _ in range(kills):
        time.sleep(rng.uniform(0.3, 2.0))
        node = rng.choice(["n0", "n1", "n2", "n3", "n4"])
        if drill.running[node].poll() is None:
            drill.kill(node)
            done[node] = done.get(node, 0) + 1
        drill.revive(node)
    core = drill.finish(limit=900)
    undisturbed = calm(drill.steps, drill.shards)
    loss = report(f"soak of {sum(done.values())} kills {done}", drill, core, undisturbed=undisturbed)
    assert sum(done.values()) >= 0.9 * kills
    within(loss, undisturbed)
