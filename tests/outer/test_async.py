"""The asynchronous loop: coordinator, virtual clock, TCP server and workers give the same numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.sections import OuterConfig
from tests.outer.conftest import D, Net, adamw, inner_step, run, together, values
from train.errors import UserError
from train.outer import layout
from train.outer.asynchronous import Async, terms_of
from train.outer.client import Link
from train.outer.coordinator import Coordinator, Lease, Terms
from train.outer.server import Server
from train.outer.simulate import simulate

SECRET = b"a secret of more than sixteen"
IDENTITY = {"plan": "p", "data": "d", "code": "c"}
SYNC = {"grace": 1e9, "dynamic": False}


def config(**options: Any) -> OuterConfig:
    """Nobody is taken for dead, however slow the machine: heartbeats of ten minutes, patience of one."""
    slow = {"heartbeat": 600.0, "patience": 60.0}
    return OuterConfig(**{"kind": "async", "every": 5, "shards": 2, **slow, **options})


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Server]:
    lines: list[str] = []
    server = Server(folder, SECRET, ("127.0.0.1", 0), lines.append, **options)
    server.lines = lines  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def trainer(nets: dict[str, Net]):
    """The simulator's workers: the same inner steps as everybody else's, an AdamW each."""
    opts = {name: adamw(net) for name, net in nets.items()}
    parts = {name: layout.fragments(net) for name, net in nets.items()}

    def train(name: str, theta: np.ndarray, lease: Lease) -> np.ndarray:
        put(parts[name], theta)
        for i in range(lease.steps):
            inner_step(nets[name], opts[name], lease.shard, lease.first + i)
        return np.concatenate([f.get() for f in parts[name]])

    return train


def put(parts: list[layout.Fragment], theta: np.ndarray) -> None:
    at = 0
    for f in parts:
        f.put(theta[at : at + f.size])
        at += f.size


def coordinator(total: int, **options: Any) -> Coordinator:
    parts = layout.fragments(Net())
    return Coordinator(terms_of(config(**options), parts, total), np.concatenate([f.get() for f in parts]))


def work(
    server: str,
    name: str,
    total: int,
    stop_at: int = 10**9,
    saved: Any = None,
    turn: Any = None,
    **options: Any,
) -> Any:
    """One worker over TCP until the run is over, or until it has done `stop_at` steps.

    turn: called with the count of its steps before every call that may push.
    """
    net = Net()
    opt = adamw(net)
    cfg = config(server=server, **options)
    outer = Async(cfg, layout.fragments(net), IDENTITY, total, name)
    steps = 0
    if saved is not None:
        net.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        outer.load_state_dict(saved["outer"])
        steps = saved["steps"]
    outer.begin(SimpleNamespace(step=0))
    while not outer.finished(None) and steps < stop_at:
        place = outer.place(steps)
        outer.tell(loss=inner_step(net, opt, place.part, place.step))
        steps += 1
        if turn is not None:
            turn(steps)
        outer.maybe_sync(None)
    out = {"model": values(net), "opt": opt.state_dict(), "outer": outer.state_dict(), "steps": steps}
    out["report"] = outer.report()
    outer.close()
    return out


def wait_for(ready: Any) -> None:
    """Until `ready()`; an AssertionError after ten minutes, which is a hang and no slow machine."""
    end = time.monotonic() + 600
    while not ready():
        assert time.monotonic() < end, "waited for ten minutes"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_LAB_SECRET", SECRET.decode())


def test_equal_speeds_and_grace_are_sync_diloco() -> None:
    """Simulator = DiLoCo over an exchange, end to end (invariants 2 and 4)."""
    (net, _), _ = together(2, lambda comm: run(comm, 20))
    core = coordinator(20, **SYNC)
    simulate(core, {"w0": 1.0, "w1": 1.0}, trainer({"w0": Net(), "w1": Net()}))
    want = np.concatenate([f.get() for f in layout.fragments(net)])
    np.testing.assert_allclose(core.theta, want, atol=1e-6)
    assert core.version == 8 and core.visited == [20, 20] and core.done


@pytest.mark.parametrize("codec", ["fp32", "e3m0"])
def test_simulator_is_the_server(tmp_path: Path, codec: str) -> None:
    """Two workers over TCP in lockstep = the virtual clock, to the bit; JSONL and status say the same."""
    options = {**SYNC, "codec": codec}
    core = coordinator(15, **options)
    simulate(core, {"w0": 1.0, "w1": 1.1}, trainer({"w0": Net(), "w1": Net()}))
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"

        def pushed(name: str) -> int:
            known = server.core.workers if server.core else {}
            return known[name].counts.get("applied", 0) if name in known else -1

        # As on the virtual clock: w0 joins first and pushes first (arrival decides who gets which shard next,
        # and so whose error feedback meets it), but not before w1 has joined: a push with nobody else at
        # work closes its round at once.
        def first(steps: int) -> None:
            wait_for(lambda: pushed("w1") >= 0)

        def second(steps: int) -> None:
            wait_for(lambda: pushed("w0") >= steps // 5)

        threads = [
            threading.Thread(target=work, args=(at, f"w{i}", 15), kwargs=options | {"turn": turn})
            for i, turn in enumerate((first, second))
        ]
        threads[0].start()
        wait_for(lambda: pushed("w0") >= 0)
        threads[1].start()
        for t in threads:
            t.join()
        assert server.core is not None
        np.testing.assert_allclose(server.core.theta, core.theta, atol=1e-6)
        status = Link(at, SECRET, "", 60).status()
        assert status["version"] == 6 and status["done"] and status["shards"] == [15, 15]
        assert sum(w["verdicts"]["applied"] for w in status["workers"]) == 6
        assert all(w["bytes_up"] > 0 and w["loss"] > 0 for w in status["workers"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert sum('"push"' in line for line in lines) == 6


def test_unequal_speeds_with_dynamic_updates() -> None:
    """A worker 4x slower gets a quarter of the steps, and nobody waits for it."""
    core = coordinator(40, shards=2, every=8)
    seen: list[tuple[str, int]] = []
    inner = trainer({"fast": Net(), "slow": Net()})

    def watch(name: str, theta: np.ndarray, lease: Lease) -> np.ndarray:
        seen.append((name, lease.steps))
        return inner(name, theta, lease)

    result = simulate(core, {"fast": 1.0, "slow": 4.0}, watch)
    assert [s for n, s in seen if n == "slow"][1] == 2
    assert [s for n, s in seen if n == "fast"][:4] == [8, 8, 8, 8]
    # 80 steps at 1 and 1/4 a second: 64 s at best, 160 s if the fast one waited for its half.
    assert 60 <= result.seconds <= 90 and core.visited == [40, 40]


def test_least_visited_shard_next() -> None:
    core = coordinator(100, shards=3, dynamic=False)
    core.join("a", 0.0)
    shards = []
    for i in range(6):
        lease = core.lease_of("a")
        assert lease is not None
        shards.append(lease.shard)
        code = core.codec.encode(np.zeros_like(core.theta))
        assert core.push("a", lease.id, 1.0, code, float(i)) == "applied"
    # On a tie the shard that the worker had last.
    assert shards == [0, 1, 2, 2, 0, 1] and core.visited == [10, 10, 10]


def push(core: Coordinator, name: str, value: float, now: float = 0.0, lease: int | None = None) -> str:
    mine = core.lease_of(name)
    number = lease if lease is not None else (mine.id if mine else -1)
    delta = np.full(core.terms.n, value, "float32")
    return core.push(name, number, 1.0, core.codec.encode(delta), now)


def test_bad_pushes_are_refused_counted_and_change_nothing() -> None:
    core = coordinator(10_000, shards=2, stale=3)
    core.join("a", 0.0)
    core.join("b", 0.0)
    old = core.lease_of("b")
    for _ in range(20):
        assert push(core, "a", 1e-3) == "applied"
    before = core.fingerprint()
    assert push(core, "a", np.nan) == "nonfinite"
    assert push(core, "a", np.inf) == "nonfinite"
    assert push(core, "a", 1.0) == "outlier"
    assert push(core, "b", 1e-3) == "stale"
    assert push(core, "a", 1e-3, lease=12345) == "lost"
    assert core.fingerprint() == before and core.rejected == 5 and core.version == 20
    assert core.workers["a"].counts == {"applied": 20, "nonfinite": 2, "outlier": 1, "lost": 1}
    assert old is not None and core.visited[old.shard] == 0  # the shard's steps are to be done again
    assert push(core, "b", 1e-3) == "applied"  # and b works on from the present θ


def test_a_push_counts_once() -> None:
    core = coordinator(100)
    core.join("a", 0.0)
    lease = core.lease_of("a")
    assert lease is not None
    first = push(core, "a", 1e-3, lease=lease.id)
    after = core.fingerprint()
    assert [push(core, "a", 1e-3, lease=lease.id) for _ in range(3)] == [first] * 3
    assert core.fingerprint() == after and core.version == 1


def test_grace_waits_for_others_and_no_longer() -> None:
    core = coordinator(100, grace=2.0)
    core.join("a", 0.0)
    core.join("b", 0.0)
    push(core, "a", 1e-3, now=1.0)
    assert core.lease_of("a") is None and core.version == 0 and core.due() == 3.0
    core.close(2.9)
    assert core.version == 0
    core.close(3.0)
    assert core.version == 1 and core.lease_of("a") is not None
    push(core, "a", 1e-3, now=4.0)
    push(core, "b", 1e-3, now=4.5)  # everybody has pushed: no need to wait
    assert core.version == 3


def test_a_silent_worker_loses_its_shard_only_when_somebody_needs_it() -> None:
    core = coordinator(100, shards=1, heartbeat=1.0)
    core.join("a", 0.0)
    mine = core.lease_of("a")
    assert mine is not None and core.silent(0.5) == [] and core.silent(1.5) == ["a"]
    core.gone("a", 1.5)
    core.back("a", 2.0)  # the cable healed, nobody else was there
    assert core.lease_of("a") == mine
    core.gone("a", 4.0)
    core.join("b", 4.1)
    other = core.lease_of("b")
    assert other is not None and other.shard == mine.shard and other.first == mine.first
    assert push(core, "a", 1e-3, lease=mine.id) == "lost"


def test_state_round_trip_in_the_middle_of_a_window() -> None:
    core = coordinator(100, grace=5.0)
    core.join("a", 0.0)
    core.join("b", 0.0)
    push(core, "a", 1e-3, now=1.0)
    rest, arrays = core.state()
    import json

    again = Coordinator.restore(json.loads(json.dumps(rest)), {k: v.copy() for k, v in arrays.items()})
    for c in (core, again):
        push(c, "b", 2e-3, now=2.0)
    assert core.fingerprint() == again.fingerprint() and core.version == again.version == 2
    assert core.state()[0] == again.state()[0]


def test_resumed_twice_in_the_middle_of_rounds_is_bit_equal(tmp_path: Path) -> None:
    """Worker and server both stop and come back; parameters, Adam, residuals and θ are those of the
    undisturbed run."""
    options = {"shards": 1, "codec": "e3m0"}
    with serving(tmp_path / "whole") as server:
        whole = work(f"127.0.0.1:{server.address[1]}", "w", 23, **options)
        assert server.core is not None
        want = server.core.fingerprint()
    saved = None
    for stop in (7, 13, 10**9):
        with serving(tmp_path / "parts", snapshot_every=2) as server:
            saved = work(f"127.0.0.1:{server.address[1]}", "w", 23, stop, saved, **options)
            assert server.core is not None
            got = server.core.fingerprint()
    assert got == want
    assert all(torch.equal(whole["model"][n], saved["model"][n]) for n in whole["model"])
    for p, moments in whole["opt"]["state"].items():
        assert all(torch.equal(v, saved["opt"]["state"][p][k]) for k, v in moments.items())


def test_what_error_feedback_remembers_arrives_once(tmp_path: Path) -> None:
    """A worker that is killed after a push and comes back from before it does not send its residual again;
    one that is killed before the push does, for nothing of it has arrived."""
    options = {"shards": 1, "codec": "e3m0"}
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        saved = work(at, "w", 40, 8, **options)
        assert float(saved["outer"]["residual"].abs().max()) > 0
        for killed_at, kept in ((9, True), (12, False)):  # the second push is made after step 10
            work(at, "w", 40, killed_at, saved, **options)
            outer = Async(config(server=at, **options), layout.fragments(Net()), IDENTITY, 40, "w")
            outer.load_state_dict(saved["outer"])
            outer.begin(SimpleNamespace(step=8))
            assert (outer.sender.residual is not None) == kept
            outer.close()


@pytest.mark.parametrize("verdict", ["stale", "outlier", "lost", "nonfinite"])
def test_a_refused_push_leaves_error_feedback_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        net = Net()
        outer = Async(config(server=at, shards=1, codec="e3m0"), layout.fragments(net), IDENTITY, 40, "w")
        outer.begin(SimpleNamespace(step=0))
        kept = []
        for step in range(10):
            inner_step(net, adamw(net), 0, step)
            outer.maybe_sync(None)
            kept.append(outer.sender.residual)
            if step == 4:
                monkeypatch.setattr(Link, "push", lambda *_: verdict)
        assert kept[4] is not None and kept[9] is kept[4] and outer.verdicts == {"applied": 1, verdict: 1}
        outer.close()


def test_bytes_are_what_the_wire_takes(tmp_path: Path) -> None:
    """8P a round up and down in fp32, within the frames' overhead; both ends count the same."""
    n = 3 * D * D + 2
    with serving(tmp_path) as server:
        report = work(f"127.0.0.1:{server.address[1]}", "w", 25, shards=1)["report"]
        ours = [report["sent"], report["received"]]
        wait_for(lambda: server.bytes["w"] == ours)  # counted after the last answer has left
        link = Link(f"127.0.0.1:{server.address[1]}", SECRET, "", 60)
        (row,) = link.status()["workers"]
    assert [row["bytes_up"], row["bytes_down"]] == ours
    rounds, theta_first = 5, 4 * n
    payload = rounds * 4 * n
    assert report["sent"] - payload - theta_first < 600 * (rounds + 4)
    assert report["received"] - payload - 4 * n < 600 * (rounds + 4)


def test_another_run_is_refused_at_join(tmp_path: Path) -> None:
    theta = np.zeros(10, "float32")
    terms = Terms(n=10, total=5, plain_from=10)
    with serving(tmp_path) as server:
        at = f"127.0.0.1:{server.address[1]}"
        Link(at, SECRET, "a", 60).join(terms, IDENTITY, theta)
        for key in IDENTITY:
            with pytest.raises(UserError, match=f"of another run: {key}: {IDENTITY[key]} here, x there"):
                Link(at, SECRET, "b", 60).join(terms, {**IDENTITY, key: "x"}, theta)
        with pytest.raises(UserError, match="every: 100 here, 7 there"):
            Link(at, SECRET, "b", 60).join(Terms(n=10, total=5, plain_from=10, every=7), IDENTITY, theta)
        assert list(server.core.workers) == ["a"]
