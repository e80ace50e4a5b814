"""Several ranks train what one process trains, however the model is cut among them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.conftest import command
from train import checkpoint
from train.metrics import read
from train.pretrain import main

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
    for name in ARCHS:
        parameters, moments = far(end(here / "one" / name), end(here / "two" / name))
        assert parameters < 1e-5 and moments < 1e-4, (name, parameters, moments)  # gla's k gradient cancels
        one, two = losses(here / "one" / name), losses(here / "two" / name)
        assert [s for s, _ in one] == [s for s, _ in two]
        assert max(abs(a - b) for (_, a), (_, b) in zip(one, two)) < 1e-5
        assert not list((here / "two" / name).rglob("*.parts"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("run.parallel=fsdp2", "run.reshard=true"),
        ("run.parallel=hybrid", "run.shard=1"),
        ("run.parallel=ddp",),
    ],
    ids=["fsdp2", "hybrid", "ddp"],
)
def test_ranks_may_change_at_every_resume(here, data, how) -> None:
    """parallel: 2 -> 1 -> 2 ranks see the same tokens and end with the same parameters as a straight run."""
    archs = ("onion", "samba")
    assert main(words(data, "one", archs=archs)) == 0
    two = words(data, "two", *how, archs=archs)
    assert command(*two, cwd=here, ranks=2).returncode == 0
    back(here / "two", 2)
    assert main([*words(data, "two", archs=archs), "--resume"]) == 0
    back(here / "two", 4)
    assert command(*two, "--resume", cwd=here, ranks=2).returncode == 0
    for name in archs:
        one, again = end(here / "one" / name), end(here / "two" / name)
        assert max(float((one[n] - again[n]).abs().max()) for n in one) < 1e-6, name
        assert [s for s, _ in losses(here / "one" / name)] == [s for s, _ in losses(here / "two" / name)]


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
    """parallel: two DiLoCo workers of two sharded ranks each train what two workers of one rank do."""
    sets = ("outer={kind: diloco, workers: 2, every: 2}",)
    for folder, ranks, how in (("one", 2, "ddp"), ("two", 4, "fsdp2")):
        done = command(
            *words(data, folder, f"run.parallel={how}", *sets, archs=("onion",)), cwd=here, ranks=ranks
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert max(far(end(here / "one"), end(here / "two"))) < 1e-5
