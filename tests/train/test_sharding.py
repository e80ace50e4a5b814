"""Several ranks train what one process trains, however the model is cut among them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dataset
import model
from model.config import load
from tests.train.conftest import ROOT, command
from train import checkpoint
from train.heldout import evaluate
from train.metrics import read
from train.pretrain import main
from train.sharding import groups
from train.sites import site_stats
from train.stage import heldout_view
from train.world import ALONE

PRETRAIN64 = ROOT / "tests" / "train" / "pretrain64.py"

COMMON = """
dim: 32
defaults:
  mamba2: {state: 8, head_dim: 16}
  swa: {head_dim: 16, group: 1, window: 8}
  gla: {head_dim: 16}
  mlp: {mult: 2, multiple_of: 8}
heads: {recon: {shift: 0, weight: 0.5}, next: {shift: 1}}
run: {steps: 6, batch: 4, micro: 1, context: 32, precision: fp32, eval_every: 3, eval_tokens: 160,
      save_every: 2, log_every: 1, keep: 9}
optim: {lr: 1e-3, eps: 1e-4}
"""
# eps: AdamW's first steps are lr * g / (|g| + eps); where g is a rounding error, so would the step be.
ARCHS = {
    "samba": COMMON + "stack: [{repeat: 2, of: [mamba2, mlp, swa, mlp]}]\n",
    "yoco": COMMON
    + """
stack:
  - yoco: {self: [gla, mlp], memory: {head_dim: 16, group: 1}, cross: [{repeat: 2, of: [xattn, mlp]}]}
""",
    "onion": COMMON
    + """
stack:
  - onion:
      - {name: s1, body: [samba], to: 16, quant: int8, frozen: true}
      - {name: s2, body: [mlp], to: 16, quant: {fsq: {levels: 8}}, blend: {steps: 4}}
""",
}

TABLES = COMMON + "stack: [{onion: [{name: s1, body: [mlp], to: 16, quant: {vq: {codes: 16, groups: 2}}}]}]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in ARCHS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def words(data: Path, folder: str, *sets: str, archs=tuple(ARCHS)) -> list[str]:
    out = ["--data", str(data), "--run-dir", folder]
    for name in archs:
        out += ["--arch", f"{name}.yaml"]
    for item in sets:
        out += ["--set", item]
    return out


def end(run: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's model tensors and optimizer moments, by name."""
    loaded = checkpoint.load(checkpoint.saved(run)[0])
    out = dict(loaded.model)
    for name, moments in loaded.train["optimizer"].items():
        out |= {f"{name}/{k}": v for k, v in moments.items()}
    return out


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The largest difference of any parameter and of any moment, relative to the tensor's largest value."""
    assert a.keys() == b.keys()
    found = [0.0, 0.0]
    for n in a:
        off = float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-3))
        found["/" in n] = max(found["/" in n], off)
    return found[0], found[1]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read(run) if r["kind"] in ("train", "eval")]


def test_fully_sharded_ranks_equal_one_process(here, data) -> None:
    """Shared, frozen and twice visited modules included; what two ranks saved, one loads, and back."""
    assert main(words(data, "one")) == 0
    done = command(*words(data, "two", "run.parallel=fsdp2"), cwd=here, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    config = load("samba.yaml")
    rows = heldout_view(config, dataset.open(data))
    assert rows is not None
    for name in ARCHS:
        parameters, moments = far(end(here / "one" / name), end(here / "two" / name))
        # yoco's moments are 3e-5 off: gla's gradient for k cancels. That is the order of summation alone, see
        # the two tests below.
        assert parameters < 1e-5 and moments < 1e-4, (name, parameters, moments)
        one, two = losses(here / "one" / name), losses(here / "two" / name)
        assert [s for s, _ in one] == [s for s, _ in two]
        assert max(abs(a - b) for (_, a), (_, b) in zip(one, two)) < 1e-5
        assert not list((here / "two" / name).rglob("*.parts"))
        found = evaluate(model.load(here / "two" / name), rows, config.run, ALONE)  # saved on 2, loaded on 1
        assert found.loss == pytest.approx(two[-1][1], rel=1e-6)


def trained(dtype: torch.dtype, halves: bool) -> dict[str, torch.Tensor]:
    """Parameters and moments of a yoco after six steps on four rows, one process: gradients are summed row
    by row, or first in two halves, as two ranks do."""
    torch.manual_seed(0)
    lm = model.build(load("yoco.yaml"), vocab=260).to(dtype)
    params = dict(lm.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, eps=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        rows = torch.randint(32, 127, (4, 32), generator=generator)
        sums = []
        for part in ((0, 1), (2, 3)) if halves else ((0, 1, 2, 3),):
            for i in part:
                row = rows[i : i + 1]
                lm(row, labels=row, norms={"recon": 128.0, "next": 124.0}).loss.backward()
            sums.append({n: p.grad.clone() for n, p in params.items() if p.grad is not None})
            optimizer.zero_grad()
        for n in sums[0]:
            params[n].grad = sums[0][n] + sums[1][n] if halves else sums[0][n]
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    out = {n: p.detach() for n, p in params.items()}
    moments = {n: optimizer.state[p] for n, p in params.items() if p in optimizer.state}
    return out | {f"{n}/{k}": m[k] for n, m in moments.items() for k in ("exp_avg", "exp_avg_sq")}


def test_the_order_of_summation_moves_moments_as_far(here) -> None:
    """What `run.parallel` leaves, without it: measured 4e-6 in a parameter and 2e-5 in a moment in fp32,
    4e-15 and 2e-14 in fp64."""
    parameters, moments = far(trained(torch.float32, False), trained(torch.float32, True))
    assert parameters < 1e-5 and 1e-6 < moments < 1e-4
    assert max(far(trained(torch.float64, False), trained(torch.float64, True))) < 1e-12


def test_statistics_leave_a_sharded_model_as_it_was(here, data, tmp_path) -> None:
    """FSDP2 keeps gathered weights after a forward pass; what then reads the shards would not be seen."""
    config = load("samba.yaml", ["run.parallel=fsdp2"])
    rows = heldout_view(config, dataset.open(data))
    assert rows is not None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        lm = model.build(config, vocab=260)
        for modules in (*groups(lm), lm):
            fully_shard(modules, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=False)
        found = site_stats(lm, rows, config, ALONE)
        assert found["activations"] and all(isinstance(p, DTensor) for p in lm.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_in_double_precision_differ_by_rounding_alone(here, data) -> None:
    """parallel: where fp32 leaves 3e-5, fp64 leaves nothing, so no term is missing and none counts twice."""
    for folder, ranks, how in (("one", 0, "ddp"), ("two", 2, "fsdp2")):
        line = words(data, folder, f"run.parallel={how}", archs=("yoco",))
        done = command(*line, cwd=here, ranks=ranks, script=PRETRAIN64)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = end(here / "one"), end(here / "two")
    assert one["embed.weight"].dtype == torch.float64
    assert max(far(one, two)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("run.parallel=fsdp2", "run.reshard=true"),
        ("run.parallel=hybrid", "run.shard=1"),
        ("run.parallel=ddp",),
        ("run.parallel=ddp", "outer={kind: streaming, workers: 1, every: 4, fragments: 2, overlap: 1}"),
    ],
    ids=["fsdp2", "hybrid", "ddp", "streaming"],
)
def test_ranks_may_change_at_every_resume(here, data, how) -> None:
    """parallel: 2 -> 1 -> 2 ranks see the same tokens and end with the same parameters as a straight run."""
    archs, outer = ("onion", "samba"), how[1:] if "streaming" in how[-1] else ()
    assert main(words(data, "one", *outer, archs=archs)) == 0
    two = words(data, "two", *how, archs=archs)
    assert command(*two, cwd=here, ranks=2).returncode == 0
    back(here / "two", 2)
    assert main([*words(data, "two", *outer, archs=archs), "--resume"]) == 0
    back(here / "two", 4)
    assert command(*two, "--resume", cwd=here, ranks=2).returncode == 0
    for name in archs:
        one, again = end(here / "one" / name), end(here / "two" / name)
        assert max(float((one[n] - again[n]).abs().max()) for n in one) < 1e-6, name
        a, b = losses(here / "one" / name), losses(here / "two" / name)
        assert [s for s, _ in a] == [s for s, _ in b]
        assert max(abs(x - y) for (_, x), (_, y) in zip(a, b)) < 1e-5  # the same tokens at every step


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_compiled_modules_train_alike_on_several_ranks(here, data, how) -> None:
    """parallel: torch.compile of every bank module, then wrapped; names in the checkpoint do not change."""
    (here / "small.yaml").write_text(COMMON + "stack: [gla, mlp]\n")
    assert main(words(data, "one", archs=("small",))) == 0
    done = command(
        *words(data, "two", f"run.parallel={how}", "run.compile=true", archs=("small",)), cwd=here, ranks=2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(far(end(here / "one"), end(here / "two"))) < 1e-4


def back(runs: Path, step: int) -> None:
    """As if the runs had been stopped after the save of `step`."""
    from train.rundir import set_status

    for run in runs.iterdir():
        set_status(run, "stopped", step=step, total=6)
        for folder in checkpoint.saved(run):
            if int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder)


@pytest.mark.slow
def test_sharded_workers_of_an_outer_loop(here, data) -> None:
    """parallel: two DiLoCo workers of two sharded ranks each train what two workers of one rank do; inside a
    round each has codes of its own."""
    (here / "tables.yaml").write_text(TABLES)
    sets = ("outer={kind: diloco, workers: 2, every: 4}",)
    for folder, ranks, how in (("one", 2, "ddp"), ("two", 4, "fsdp2")):
        done = command(
            *words(data, folder, f"run.parallel={how}", *sets, archs=("tables",)), cwd=here, ranks=ranks
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert max(far(end(here / "one"), end(here / "two"))) < 1e-5
    for step, same in ((2, False), (4, True)):
        saved = [run / "checkpoints" / f"step_{step:08d}" for run in (here / "one", here / "one/workers/1")]
        tables = [{n: t for n, t in checkpoint.load(s).model.items() if n.endswith(".table")} for s in saved]
        assert len(tables[0]) == 2 and all(torch.equal(t, tables[1][n]) == same for n, t in tables[0].items())
