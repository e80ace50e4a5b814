"""Options of the loop: each has its effect, leaves the rest alone, and survives a resume bit for bit."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from model.config import dumps
from model.schema import ConfigError
from model.sections import BatchWarmup, RunConfig
from tests.train.conftest import Fit, equal
from train import checkpoint
from train.batches import BatchPlan
from train.errors import UserError
from train.guard import NOT_FINITE, Guard
from train.outer import team
from train.outer.none import NoOuter, Place

WARM = "run.batch_warmup={from: 1, steps: 6}"
RESUMED = {
    "ema": ("run.ema=0.9",),
    "batch warm-up": (WARM,),
    "guard": ("run.spike_sigma=0.5", "run.spike_window=8", "run.steps=24"),
    "token loss": ("loss={kind: mile, z: 1e-4}",),
    "nowcast": ("nowcast={every: 2, history: 2, gate: 64}",),
    "wiener": ("optim.wiener=true",),
    "compressed": ("activations={bits: 4, only: [mlp]}",),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_bit_equal(request_of, case) -> None:
    whole = Fit(request_of("whole", *RESUMED[case]))
    Fit(request_of("parts", *RESUMED[case]), stop_after=5)
    parts = Fit(request_of("parts", *RESUMED[case], resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()
    one, two = (flat(f.state.state_dict()) for f in (whole, parts))
    clock = {k for k in one if k.endswith("seconds")}
    assert one.keys() == two.keys()
    assert [k for k in one.keys() - clock if repr(one[k]) != repr(two[k])] == []


def flat(value, path="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in flat(child, f"{path}/{key}").items()}
    return {path: value.tolist() if isinstance(value, torch.Tensor) else value}


def test_neutral_settings_change_no_bit(request_of) -> None:
    plain = Fit(request_of("plain"))
    neutral = (
        "loss={kind: mile, gamma: 0.0}",
        *("run.ema=0.9", "run.spike_sigma=1000.0", "run.stats_every=5", "run.sample=4"),
        "nowcast={every: 2, history: 3, gate: 64}",  # the zero network
        "activations.checkpoint=[mlp, attention]",
    )
    assert equal(plain.tensors(), Fit(request_of("neutral", *neutral)).tensors())


# ----------------------------------------------------------------------------- batch warm-up


def test_a_batch_plan_is_arithmetic() -> None:
    plan = BatchPlan(RunConfig(batch=16))
    assert plan.stages == [(0, 16)] and plan.before(7) == 112 and plan.steps_for(100) == 7
    plan = BatchPlan(RunConfig(batch=16, batch_warmup=BatchWarmup(2, 30)))
    assert plan.stages == [(0, 2), (10, 4), (20, 8), (30, 16)]
    sizes = [plan.size(s) for s in range(50)]
    assert [plan.before(s) for s in range(51)] == [sum(sizes[:s]) for s in range(51)]
    for wanted in (1, 19, 20, 21, 139, 140, 141, 300):
        steps = plan.steps_for(wanted)
        assert plan.before(steps) >= wanted > plan.before(steps - 1)
    assert BatchPlan(RunConfig(batch=6, batch_warmup=BatchWarmup(6, 30))).stages == [(0, 6)]


def test_batch_warmup_takes_every_sample_once_and_counts_tokens(request_of) -> None:
    from train.feed import Feed
    from train.world import World

    done = Fit(request_of("run", WARM, "run.steps=null", "run.tokens=640"))  # 20 sequences of 32
    plan = BatchPlan(done.config.run)
    feed = Feed(done.stage.view, done.config.run, World())
    got = torch.cat([m.tokens for s in range(done.state.step) for m in feed.micros(s)])
    feed.close()
    want = done.stage.view.batch(0, len(got)).tokens
    assert torch.equal(got, want) and done.state.tokens == got.numel()
    assert plan.before(done.state.step - 1) * 32 < 640 <= done.state.tokens


@pytest.mark.parametrize("sets", [(), ("run.batch_warmup={from: 2, steps: 6}",)], ids=["constant", "warm-up"])
def test_any_number_of_ranks_sees_the_same_tokens_in_the_same_order(request_of, sets) -> None:
    """So a run may change its ranks at any step: 2 -> 1 -> 2 is the order of the straight run."""
    from train.feed import Feed
    from train.stage import prepare
    from train.world import World

    request = request_of("run", "run.batch=8", *sets)
    stage = prepare(request, request.archs[0], World())

    def tokens(steps: range, size: int) -> list[torch.Tensor]:
        feeds = [Feed(stage.view, stage.config.run, World(rank, size)) for rank in range(size)]
        out = [torch.cat([m.tokens for feed in feeds for m in feed.micros(s)]) for s in steps]
        for feed in feeds:
            feed.close()
        return out

    straight = tokens(range(12), 1)
    changing = [*tokens(range(3), 2), *tokens(range(3, 7), 1), *tokens(range(7, 12), 2)]
    assert all(torch.equal(a, b) for a, b in zip(straight, changing, strict=True))
    assert len({t.numpy().tobytes() for t in straight}) == 12


# ----------------------------------------------------------------------------- guard, NaN, replay


def test_the_guard_refuses_spikes_and_remembers() -> None:
    run = RunConfig(spike_sigma=6.0, spike_window=16)
    guard, gen = Guard(run), torch.Generator().manual_seed(0)
    for _ in range(40):  # ordinary noise passes
        value = 3 + 0.1 * float(torch.randn((), generator=gen))
        assert guard.refuses(value, value) is None
    assert guard.refuses(4.5, 3.0) == "loss" and guard.refuses(3.0, 4.5) == "grad_norm"
    again = Guard(run)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.refuses(4.5, 3.0) == "loss"  # the spike before it did not widen the band
    assert again.refuses(1.0, 3.0) is None  # a fall is welcome
    assert again.refuses(math.nan, 3.0) == NOT_FINITE and again.counts == {
        "loss": 2,
        "grad_norm": 1,
        NOT_FINITE: 1,
    }
    assert Guard(RunConfig()).refuses(1e30, 1.0) is None  # off by default


def test_a_spike_is_skipped_counted_and_logged(request_of, monkeypatch) -> None:
    import train.loop

    real, calls = train.loop.clip, []

    def sometimes(params, limit):
        calls.append(1)
        return 1e6 if len(calls) == 11 else real(params, limit)

    monkeypatch.setattr(train.loop, "clip", sometimes)
    done = Fit(request_of("run", "run.spike_sigma=100.0", "run.spike_window=8"))
    (skip,) = (r for r in done.records if r.get("event") == "skip")
    assert (
        skip["reason"] == "grad_norm" and skip["step"] == 11 and done.state.guard.counts == {"grad_norm": 1}
    )
    assert done.state.skipped == 1 and not (done.stage.folder / "replay").exists()


def test_a_step_that_is_not_finite_is_kept_and_replayed(request_of, monkeypatch, capsys) -> None:
    """A weight that overflows: the replay finds the block, and in the same place."""
    import train.loop
    from train.pretrain import main
    from train.replay import replay

    real = train.loop.train_step

    def poisoned(state, *rest):
        if state.step == 6:
            with torch.no_grad():
                state.model.bank["b1_mlp"].block.down_proj.weight[0, 0] = math.inf
        elif state.step == 7:
            with torch.no_grad():
                state.model.bank["b1_mlp"].block.down_proj.weight[0, 0] = 0.0
        return real(state, *rest)

    monkeypatch.setattr(train.loop, "train_step", poisoned)
    done = Fit(request_of("run"))
    folder = done.stage.folder / "replay"
    assert done.finished and done.state.guard.counts == {NOT_FINITE: 1}
    from rich.console import Console

    found = replay(folder, [], Console())
    assert found["step"] == 6 and found["first"] == "bank.b1_mlp" and found["gradients"]
    assert main(["--replay", str(folder)]) == 0 and "bank.b1_mlp" in capsys.readouterr().out
    assert main(["--replay", str(folder / "nothing")]) == 2
    assert "no step kept for replay" in capsys.readouterr().err


def test_a_kept_step_is_written_by_rank_0_for_all(request_of, place) -> None:
    """Another machine's rank has no run folder, and asks its own disk for nothing."""
    from rich.console import Console

    from train.feed import Feed
    from train.meter import StepResult
    from train.replay import keep, replay
    from train.world import World

    class First(World):
        def on_main(self, action):
            said.append(action())
            return said[-1]

        def gather(self, value):
            return [value, value]

    class Second(First):
        def on_main(self, action):
            return said.pop(0)

    done, said = Fit(request_of("run")), []
    feed = Feed(done.stage.view, done.config.run, World())
    micros = feed.micros(11)
    feed.close()
    rest = (micros, StepResult(math.nan, {}, 0.0, 0.0, 0.0, NOT_FINITE, 0), dumps(done.config))
    folder = keep(done.stage.folder, done.state, *rest, First(0, 2))
    keep(place / "elsewhere", done.state, *rest, Second(1, 2))
    assert not said and not (place / "elsewhere").exists()
    assert [replay(folder, [], Console(), rank)["step"] for rank in (0, 1)] == [11, 11]


# ----------------------------------------------------------------------------- what is looked at


def test_ema_follows_its_formula_and_is_evaluated_and_saved(request_of) -> None:
    from train.ema import Ema

    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, want = Ema(model, 0.5), torch.zeros(1, 2)
    for n in range(1, 12):
        with torch.no_grad():
            model.weight.fill_(float(n))
        ema.update()
        d = min(0.5, (1 + n) / (10 + n))
        want = d * want + (1 - d) * n
    torch.testing.assert_close(ema.weights["weight"], want)
    with ema.applied():
        assert torch.equal(model.weight.detach(), ema.weights["weight"])
    assert torch.equal(model.weight.detach(), torch.full((1, 2), 11.0))
    done = Fit(request_of("run", "run.ema=0.9"))
    last = [r for r in done.records if r["kind"] == "eval"][-1]
    assert last["ema"]["loss"] != last["loss"] and abs(last["ema"]["loss"] - last["loss"]) < 1.0
    saved = checkpoint.load(checkpoint.saved(done.stage.folder)[0]).train["ema"]["weights"]
    assert equal(saved, done.state.ema.weights)
    from train.evaluate import evaluate

    tokens = done.config.run.eval_tokens
    scores = [
        evaluate(done.stage.folder, None, tokens, averaged=mean)["heads"]["next"]["nats"] for mean in (0, 1)
    ]
    assert scores == pytest.approx([last["losses"]["next"], last["ema"]["losses"]["next"]], rel=1e-5)
    with pytest.raises(UserError, match=r"run\.ema"):
        evaluate(Fit(request_of("plain")).stage.folder, None, tokens, averaged=True)
    alone = done.stage.folder.parent / "alone"  # as `python -m model import` makes one
    alone.mkdir()
    for name in (checkpoint.CONFIG, checkpoint.MODEL):
        shutil.copy(checkpoint.saved(done.stage.folder)[0] / name, alone)
    with pytest.raises(UserError, match=r"run\.ema"):
        evaluate(alone, done.stage.data.path, tokens, averaged=True)
    with pytest.raises(UserError, match="want at least 1 of each"):
        evaluate(done.stage.folder, None, tokens, samples=0)


def test_statistics_of_every_site_and_sample_text_on_demand(request_of) -> None:
    done = Fit(request_of("run", "run.stats_every=6", arch="mixed"))
    records = [r for r in done.records if r["kind"] == "sites"]
    assert [r["step"] for r in records] == [6, 12]
    found = records[0]["activations"]  # a shell that is visited twice has two sites
    assert list(found) == [f"{s}_0_samba" for s in ("s1.in.s1", "s2.in.s2", "s2.out.s2", "s1.out.s1")]
    assert all(0 < v["rms"] < v["max"] for v in found.values())
    assert any(name.endswith("usage") for name in records[0]["stats"])


def test_profile_and_samples_by_command(place, data, monkeypatch, capsys) -> None:
    from train.metrics import read
    from train.pretrain import main

    monkeypatch.chdir(place)
    words = ["--arch", "tiny.yaml", "--data", str(data), "--profile", "2", "--set", "run.sample=8"]
    assert main(words) == 0
    trace = json.loads((place / "runs" / "tiny" / "profile" / "trace.json").read_text())
    assert trace["traceEvents"]
    assert "aten::" in (place / "runs" / "tiny" / "profile" / "operators.txt").read_text()
    samples = [r["step"] for r in read(place / "runs" / "tiny") if r["kind"] == "sample"]
    assert samples == [0, 4, 8, 12]


def test_tokens_are_those_of_all_workers(request_of) -> None:
    """The plateau rule (tokens_per_param) and the next stage's origin count the whole run's."""
    from train.feed import Feed
    from train.loop import train_step
    from train.world import World

    done = Fit(request_of("run", "run.steps=2"))
    feed = Feed(done.stage.view, done.config.run, World(), parts=2)
    before = done.state.tokens
    result = train_step(done.state, feed.micros(2), done.config, World(worker=1, workers=2))
    feed.close()
    assert result.tokens == done.state.tokens - before == 4 * 32  # run.batch * run.context


class TwoShards(NoOuter):
    """As under async a worker alone with two shards: twice the steps, and each shard has its own count."""

    def place(self, step: int) -> Place:
        return Place(0, step // 2)

    def finished(self, state) -> bool:
        return state.step >= 2 * state.schedule.total


def test_what_follows_the_schedule_follows_the_shard_s_steps(request_of, monkeypatch, capsys) -> None:
    """Selection, the progress that is evaluated at, log lines and the time left."""
    from model.lm import LanguageModel
    from train.objective import Objective

    steps, progress = [], []
    advance = LanguageModel.advance
    monkeypatch.setattr(team, "make", lambda *args: TwoShards())
    monkeypatch.setattr(Objective, "advance", lambda self, step, total: steps.append(step))
    monkeypatch.setattr(
        LanguageModel, "advance", lambda self, s, p=0.0: (progress.append((s, p)), advance(self, s, p))[1]
    )
    done = Fit(request_of("run", "run.steps=6", "run.eval_every=5", "loss={kind: mile, gamma: 0.5}"))
    assert done.state.step == 12 and steps == [i // 2 for i in range(12)]
    evaluated = [progress[0], progress[6], progress[12], progress[-1]]  # at steps 0, 5, 10, 12
    assert evaluated == [(0, 0.0), (2, 2 / 6), (5, 5 / 6), (6, 1.0)]
    assert [r["step"] for r in done.records if r["kind"] == "train"] == [3, 6, 9, 12]
    assert "ETA" in (said := capsys.readouterr().out) and "ETA -" not in said and "step 6/6" in said


# ----------------------------------------------------------------------------- what is refused


BAD = {
    "kahan in fp32": ("optim={name: lion, kahan: true}", "precision"),
    "schedule-free with a decay": ("optim.name=schedulefree", "schedule.kind"),
    "schedule-free under an outer loop": (
        "outer.kind=diloco",
        "an outer loop moves one set",
        "optim.name=schedulefree",
        "schedule.kind=constant",
    ),
    "schedule-free without an average": ("optim={name: schedulefree, betas: [0.0, 0.9]}", "averages by it"),
    "nowcast under an outer loop": ("outer.kind=diloco", "choose one of the two", "nowcast.every=2"),
    "plateau under async": (
        "grow.when=plateau",
        "no common step",
        "outer={kind: async, server: 'localhost:9'}",
    ),
    "release in pieces": ("optim={name: adalomo, release: true, clip: 0.0}", "run.micro"),
    "release with clipping": ("optim={name: adalomo, release: true}", "clip: 0"),
    "selection without a reference": ("select.rho={keep: 0.5}", "ref"),
    "selection without its sidecar": ("select.rho={ref: nothing}", "no finished sidecar"),
    "a parameter of another loss": ("loss.gamma=2", "for the kinds mile, and this loss is ce"),
    "few bits of nothing": ("activations={bits: 4, only: []}", "is empty"),
    "sites without bits": ("activations.only=[attention]", "without `bits`"),
    "unknown site": ("activations.checkpoint=[mpl]", "did you mean 'mlp'"),
    "unknown network": ("nowcast={every: 2, net: nowhere.safetensors}", "holds no network"),
    "width that cannot be": ("optim.mup.base=7", "cannot be built at width 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_before_anything_is_written(place, data, monkeypatch, capsys, case) -> None:
    from train.pretrain import main

    monkeypatch.chdir(place)
    first, expected, *more = BAD[case]
    words = [word for item in (first, *more) for word in ("--set", item)]
    assert main(["--arch", "tiny.yaml", "--data", str(data), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error and not (place / "runs").exists()


def test_config_errors_name_the_key() -> None:
    from model.config import load

    with pytest.raises(ConfigError, match=r"run\.ema"):
        load({"dim": 8, "stack": ["mlp"], "run": {"ema": 1.0}})
