"""DiLoCo and streaming: what ties them to plain training, to each other, and replicas to replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.sections import OuterConfig, ScheduleConfig
from tests.outer.conftest import (
    Net,
    adamw,
    gap,
    inner_step,
    loss_of,
    make_outer,
    rows,
    run,
    sgd,
    together,
    values,
)
from train.errors import UserError
from train.outer.codec import CODECS
from train.outer.diloco import DiLoCo
from train.outer.exchange import Alone, Channel, Meeting, Traffic
from train.outer.lockstep import parts_of
from train.outer.streaming import Streaming
from train.schedule import Schedule
from train.world import World


def bits(net: Net) -> list[bytes]:
    return [t.numpy().tobytes() for t in values(net).values()]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_step_with_plain_sgd_is_data_parallel(dtype: torch.dtype, limit: float) -> None:
    """H = 1, outer SGD lr 1 β 0, inner SGD, k = 4: one process on the joined batch (invariant 1)."""
    options = {"every": 1, "lr": 1.0, "momentum": 0.0}
    (net, _), *_ = together(4, lambda comm: run(comm, 30, sgd, dtype, **options))
    single = Net(dtype=dtype)
    opt = sgd(single)
    for step in range(30):
        loss = loss_of(single, torch.cat([rows(shard, step, dtype=dtype) for shard in range(4)]))
        opt.zero_grad()
        loss.backward()
        opt.step()
    trained = [n for n, p in single.named_parameters() if p.requires_grad]
    for name in trained:
        assert float((values(net)[name] - values(single)[name]).abs().max()) <= limit


def test_one_worker_with_plain_sgd_is_no_outer_loop() -> None:
    """k = 1, lr 1, β 0: plain AdamW up to rounding (invariant 3)."""
    net, _ = run(Alone(), 60, lr=1.0, momentum=0.0)
    plain = Net()
    opt = adamw(plain)
    for step in range(60):
        inner_step(plain, opt, 0, step)
    assert gap(net, plain) <= 1e-6


@pytest.mark.parametrize("codec", CODECS)
def test_streaming_in_one_piece_is_diloco_to_the_bit(codec: str) -> None:
    stream = {"kind": "streaming", "fragments": 1, "overlap": 0, "blend": 0.0, "codec": codec}
    a = together(3, lambda comm: run(comm, 23, codec=codec))
    b = together(3, lambda comm: run(comm, 23, **stream))
    assert [bits(n) for n, _ in a] == [bits(n) for n, _ in b]


def test_streaming_with_local_weight_one_is_no_communication() -> None:
    options = {"kind": "streaming", "blend": 1.0, "overlap": 2}
    for net, outer in together(2, lambda comm: run(comm, 23, **options)):
        plain = Net()
        opt = adamw(plain)
        for step in range(23):
            inner_step(plain, opt, outer.comm.rank, step)
        assert bits(net) == bits(plain)


@pytest.mark.parametrize("kind", ["diloco", "streaming"])
@pytest.mark.parametrize("codec", CODECS)
def test_replicas_are_equal_to_the_bit(kind: str, codec: str) -> None:
    """Also with lossy codecs, at the end of a run that is no multiple of H; statistics included."""
    results = together(3, lambda comm: run(comm, 23, kind=kind, codec=codec))
    assert len({tuple(bits(net)) for net, _ in results}) == 1
    assert len({outer.fingerprint() for _, outer in results}) == 1
    if kind == "diloco":  # streaming forgets the `overlap` steps that statistics made under way
        assert values(results[0][0])["bank.a.seen"].tolist() == pytest.approx([23.0, 23.0])  # mean shard: 1


@pytest.mark.parametrize("kind", ["diloco", "streaming"])
def test_training_goes_down(kind: str) -> None:
    def held_out(net: Net) -> float:
        return float(loss_of(net, rows(99, 0, 256)).detach())

    (net, _), _ = together(2, lambda comm: run(comm, 60, kind=kind, codec="e3m0"))
    assert held_out(net) < 0.8 * held_out(Net())


def test_only_trainable_tensors_travel() -> None:
    net, traffic = Net(), Traffic()
    outer = make_outer(net, Alone())
    names = [n for r in outer.replicas for n in r.fragment.names]
    assert "bank.d.weight" not in names and set(names) == {f"bank.{m}.weight" for m in "abc"} | {
        "bank.a.seen"
    }
    results = together(2, lambda comm: run(comm, 5))
    elements = sum(r.fragment.size for r in outer.replicas)
    for _, o in results:
        assert o.traffic.sent == o.traffic.received == 4 * elements  # 2 (k-1)/k * 4 bytes, k = 2
    assert traffic.sent == 0


@pytest.mark.parametrize(("codec", "less"), [("fp32", 1), ("bf16", 2), ("e3m0", 7.7)])
def test_bytes_are_those_of_a_ring(codec: str, less: float) -> None:
    """2 (k-1)/k * 4P per worker and round; E3M0 up to 8 times less (invariant 8)."""
    from train.outer import codec as codecs

    n, k = 1 << 16, 4

    def once(comm) -> Traffic:
        traffic = Traffic()
        Channel(n, comm, codecs.make(codec), True, traffic).mean(torch.randn(n).numpy())
        return traffic

    for t in together(k, once):
        assert t.sent == t.received
        assert t.sent == pytest.approx(2 * (k - 1) / k * 4 * n / less, rel=0.01)


def test_different_workers_are_refused() -> None:
    def work(comm) -> None:
        net = Net(seed=comm.rank)  # other initial weights
        run_state = type("S", (), {"step": 0, "schedule": type("T", (), {"total": 5})})
        make_outer(net, comm).begin(run_state)

    with pytest.raises(UserError, match="outer parameters"):
        together(2, work)


@pytest.mark.parametrize("key", ["plan", "data", "code"])
def test_another_plan_dataset_or_code_is_refused(key: str) -> None:
    def work(comm) -> None:
        outer = make_outer(Net(), comm)
        outer.identity[key] = str(comm.rank)
        outer.begin(type("S", (), {"step": 0}))

    with pytest.raises(UserError, match="worker 0: 0, worker 1: 1"):
        together(2, work)


def test_drifted_replicas_are_found_before_the_next_exchange() -> None:
    def work(comm) -> None:
        net = Net()
        outer, opt = make_outer(net, comm), adamw(net)
        state = type("S", (), {"step": 0, "schedule": type("T", (), {"total": 99})})
        for step in range(10):
            inner_step(net, opt, comm.rank, step)
            state.step = step + 1
            if step == 6 and comm.rank == 1:
                outer.replicas[0].outer[3] += 1e-6
            outer.maybe_sync(state)

    with pytest.raises(UserError, match="step 10: replicas differ in their outer parameters"):
        together(2, work)


def test_a_non_finite_delta_is_left_out_and_counted() -> None:
    def work(comm):
        net = Net()
        outer, opt = make_outer(net, comm), adamw(net)
        state = type("S", (), {"step": 0, "schedule": type("T", (), {"total": 5})})
        for step in range(5):
            inner_step(net, opt, comm.rank, step)
            if step == 4 and comm.rank == 1:
                net.bank["b"].weight.data[0, 0] = float("nan")
            state.step = step + 1
            outer.maybe_sync(state)
        return net, outer

    results = together(2, work)
    assert [o.report()["dropped"] for _, o in results] == [0, 1]
    assert all(torch.isfinite(t).all() for net, _ in results for t in values(net).values())
    assert bits(results[0][0]) == bits(results[1][0])


def test_a_worker_that_wants_to_stop_stops_all_at_the_same_step() -> None:
    for kind in ("diloco", "streaming"):

        def work(comm, kind=kind) -> int:
            net = Net()
            outer, opt = make_outer(net, comm, kind=kind), adamw(net)
            state = type("S", (), {"step": 0, "schedule": type("T", (), {"total": 99})})
            for step in range(50):
                inner_step(net, opt, comm.rank, step)
                state.step = step + 1
                outer.maybe_sync(state)
                if outer.agree(comm.rank == 1 and step >= 6):
                    return state.step
            return -1

        steps = together(3, work)
        assert len(set(steps)) == 1 and 7 < steps[0] <= 15


@pytest.mark.parametrize("kind", [DiLoCo, Streaming])
def test_ranks_with_whole_models_save_one_state_for_any_number_of_ranks(kind) -> None:
    """Under DDP every rank of a worker has the same outer state; of a cut model each has a part."""

    def outer(world: World):
        net = Net()
        config = OuterConfig("diloco" if kind is DiLoCo else "streaming", every=4)
        return kind(config, parts_of(net, config), Alone(), {}, world)

    two = outer(World(rank=1, size=2))
    for r in two.replicas:
        r.step(r.outer + 1)
    saved = two.state_dict()
    one = outer(World())
    one.load_state_dict(saved)
    assert one.fingerprint() == two.fingerprint() and repr(one.state_dict()) == repr(saved)
    with pytest.raises(UserError, match=r"in 2 part\(s\), this worker's in 1: .* resumes on as many ranks"):
        one.load_state_dict({**saved, "ranks": saved["ranks"] * 2})


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["diloco", "streaming"])
def test_the_plateau_of_worker_0_ends_the_stage_of_all(kind: str, decay: float) -> None:
    """Worker 0 finds it at step 6, worker 1 before, worker 2 never; all end at one step with equal bits."""

    def work(comm) -> tuple[Net, int, int]:
        net = Net()
        outer, opt = make_outer(net, comm, kind=kind, overlap=2), adamw(net)
        state = SimpleNamespace(step=0, schedule=Schedule(ScheduleConfig(warmup=0, decay=decay), 99))
        while not outer.finished(state):
            inner_step(net, opt, comm.rank, state.step)
            state.step += 1
            outer.maybe_sync(state)
            outer.plateau(state, state.step >= (6, 2, 1000)[comm.rank])
        assert not getattr(outer, "_pending", {})
        return net, state.step, state.schedule.decay_at

    (net, end, began), *others = together(3, work)
    assert 6 < began <= 13 and end == (began if not decay else round(began / (1 - decay)))
    assert all(o[1:] == (end, began) and bits(o[0]) == bits(net) for o in others)


def test_a_wish_to_stop_is_not_resumed() -> None:
    """It travels with every fragment under way when all stop; those are saved, the wish is not."""
    options = {"kind": "streaming", "every": 8, "fragments": 3, "overlap": 5}

    def work(comm, start: int = 0, saved: Any = None, wish: int = 99) -> tuple[int, Any]:
        net = Net()
        outer, opt = make_outer(net, comm, **options), adamw(net)
        if saved is not None:
            outer.load_state_dict(saved)
        state = SimpleNamespace(step=start, schedule=SimpleNamespace(total=99))
        while state.step < 60 and not outer.agree(comm.rank == 1 and state.step >= wish):
            inner_step(net, opt, comm.rank, state.step)
            state.step += 1
            outer.maybe_sync(state)
        return state.step, outer.state_dict()

    stopped = together(2, lambda comm: work(comm, wish=20))
    assert 20 < stopped[0][0] < 40 and stopped[0][1]["ranks"][0]["pending"]
    resumed = together(2, lambda comm: work(comm, *stopped[comm.rank]))
    assert [step for step, _ in resumed] == [60, 60]


def test_a_meeting_that_breaks_up_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        together(2, lambda comm: comm.share(b"") if comm.rank else 1 / 0)
    assert Meeting(2).size == 2
