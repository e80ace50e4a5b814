"""Every optimizer: resumed it goes on bit for bit, and it computes what its paper says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model.schema import ConfigError
from model.sections import OptimConfig
from tests.train.conftest import Fit, equal
from train import optim
from train.optim.adalomo import AdaLomo
from train.optim.adam_mini import AdamMini
from train.optim.groups import Group
from train.optim.schedulefree import ScheduleFree

SETS = {
    "adamw": (),
    "muon": (),
    "stableadamw": (),
    "lion": ("optim.lr=1e-3",),
    "adan": ("optim.betas=[0.98, 0.92, 0.99]",),
    "schedulefree": ("schedule.kind=constant",),
    "adam_mini": (),
    "adalomo": (),
}


def group_of(p: nn.Parameter, **rest) -> list[Group]:
    base = {"params": [p], "names": ["w"], "lr_scale": 1.0, "weight_decay": 0.0, "matrix": True, "rows": 1}
    return [base | rest]


def walk(make, shape=(6, 4), steps=4, seed=0) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A few steps on random gradients from a fixed start."""
    gen = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=gen))
    optimizer = make(p)
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=gen)
        optimizer.step()
    return p.detach(), optimizer


def numbers(fit: Fit) -> int:
    """Numbers that the optimizer keeps."""
    return sum(v.numel() for n, v in fit.tensors().items() if n.startswith("optim/"))


def test_the_table_is_tested_whole() -> None:
    assert set(SETS) == set(optim.OPTIMIZERS)


@pytest.mark.parametrize("name", SETS)
def test_resume_is_bit_equal_and_the_loss_falls(request_of, name) -> None:
    sets = (f"optim.name={name}", *SETS[name])
    whole = Fit(request_of("whole", *sets))
    Fit(request_of("parts", *sets), stop_after=5)
    parts = Fit(request_of("parts", *sets, resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()
    evals = [r["loss"] for r in whole.records if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.1


def test_options_that_an_optimizer_lacks_are_refused(request_of) -> None:
    for sets in (("optim.name=muon", "optim.kahan=true"), ("optim.name=adan",), ("optim.betas=[0.9]",)):
        with pytest.raises(ConfigError):
            Fit(request_of("x", *sets))
    for sets in (("optim.name=schedulefree",), ("optim={name: lion, kahan: true}",)):
        with pytest.raises(ConfigError, match=r"schedule\.kind|precision"):
            Fit(request_of("x", *sets))


def test_muon_moves_matrices_by_orthogonal_steps_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 8), "hidden": nn.Linear(8, 16)})
    config = OptimConfig(name="muon", lr=0.1, decay=0.0)
    optimizer = optim.build(model, config, {"hidden.bias"}, {})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    step = (before["hidden.weight"] - model["hidden"].weight.detach()) / (0.1 * 0.2 * 4)
    assert float(torch.linalg.svdvals(step).min()) > 0.6 and float(torch.linalg.svdvals(step).max()) < 1.3
    for name in ("embed.weight", "hidden.bias"):  # Adam's first step: the sign of the gradient
        p = dict(model.named_parameters())[name]
        torch.testing.assert_close(before[name] - p.detach(), 0.1 * p.grad.sign(), rtol=1e-3, atol=1e-5)


def test_adam_mini_with_blocks_of_one_element_is_adamw() -> None:
    mini, _ = walk(lambda p: AdamMini(group_of(p, rows=0, weight_decay=0.1), 0.1, (0.9, 0.95), 1e-8))
    adam, _ = walk(lambda p: torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    torch.testing.assert_close(mini, adam, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_adam_mini_shares_one_second_moment_a_block(rows) -> None:
    got, optimizer = walk(lambda p: AdamMini(group_of(p, rows=rows), 0.1, (0.9, 0.95), 1e-8))
    (state,) = optimizer.state.values()
    assert state["block_sq"].shape == (rows,)
    gen = torch.Generator().manual_seed(0)
    w, m, v = (
        torch.randn(6, 4, generator=gen).double(),
        torch.zeros(6, 4).double(),
        torch.zeros(rows).double(),
    )
    for t in range(1, 5):
        g = torch.randn(6, 4, generator=gen).double()
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * torch.stack([part.square().mean() for part in g.chunk(rows)])
        size = (v / (1 - 0.95**t)).sqrt() + 1e-8
        w = w - 0.1 * (m / (1 - 0.9**t)) / size.repeat_interleave(6 // rows)[:, None]
    torch.testing.assert_close(got.double(), w, rtol=1e-5, atol=1e-6)


def test_adam_mini_takes_the_heads_that_blocks_declare(request_of) -> None:
    done = Fit(request_of("run", "optim.name=adam_mini", "run.steps=2"))
    shapes = {n: s["block_sq"].shape for n, s in optim.state_by_name(done.state.optimizer).items()}
    query = next(n for n in shapes if n.endswith("q_proj.weight"))
    down = next(n for n in shapes if n.endswith("down_proj.weight"))
    assert shapes[query] == (2,) and shapes[down] == (1,)  # 2 heads of 16 at dim 32
    assert shapes["embed.weight"] == done.state.model.embed.weight.shape
    adam = Fit(request_of("adam", "run.steps=2"))
    size, other = (
        sum(v.numel() for n, v in f.tensors().items() if n.startswith("optim/")) for f in (done, adam)
    )
    assert size < 0.75 * other


def test_adalomo_follows_its_equations() -> None:
    got, optimizer = walk(lambda p: AdaLomo(group_of(p, weight_decay=0.1), 0.05))
    (state,) = optimizer.state.values()
    assert state["row"].shape == (6,) and state["col"].shape == (4,)
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(6, 4, generator=gen).double()
    r, c = torch.zeros(6).double(), torch.zeros(4).double()
    for t in range(1, 5):
        g = torch.randn(6, 4, generator=gen).double()
        b = 1 - t**-0.8
        r, c = b * r + (1 - b) * g.square().mean(1), b * c + (1 - b) * g.square().mean(0)
        u = g / (r[:, None] * c[None] / r.mean()).sqrt()
        size = max(1e-3, w.square().mean().sqrt()) / max(1.0, u.square().mean().sqrt())
        w = w - 0.05 * 0.1 * w - 0.05 * size * u
    torch.testing.assert_close(got.double(), w, rtol=1e-4, atol=1e-5)


def test_adalomos_factors_are_exact_for_squares_of_rank_one() -> None:
    p = nn.Parameter(torch.ones(5, 3))
    p.grad = torch.rand(5, 1) @ torch.rand(1, 3) + 0.1
    p.grad = torch.outer(p.grad[:, 0], p.grad[0])
    optimizer = AdaLomo(group_of(p), 0.1)
    optimizer.step()
    torch.testing.assert_close(
        1 - p.detach(), torch.full((5, 3), 0.1), rtol=1e-5, atol=1e-6
    )  # g/sqrt(g²) = 1


def test_tiny_updates_move_kahan_weights_and_not_plain_bf16() -> None:
    moved = {}
    for kahan in (True, False):
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        nn.init.ones_(model[0].weight)
        optim.narrow(model)
        config = OptimConfig(name="stableadamw", lr=1e-5, decay=0.0, kahan=kahan)
        optimizer = optim.build(model, config, set(), {})
        for _ in range(400):  # 400 steps of 1e-5: half a bf16 step at 1 is 2e-3
            model[0].weight.grad = torch.ones(8, 8, dtype=torch.bfloat16)
            optimizer.step()
        moved[kahan] = float((1 - model[0].weight.detach().float()).mean())
    assert moved[False] == 0.0 and moved[True] == pytest.approx(4e-3, rel=0.1)


def test_kahan_resumes_bit_equal(request_of) -> None:
    sets = ("optim={name: stableadamw, kahan: true}", "run.precision=bf16")
    whole = Fit(request_of("whole", *sets))
    Fit(request_of("parts", *sets), stop_after=5)
    parts = Fit(request_of("parts", *sets, resume=True))
    assert equal(whole.tensors(), parts.tensors()) and whole.losses() == parts.losses()
    assert any(n.endswith("kahan_comp") for n in whole.tensors())


def test_schedule_free_evaluates_the_mean_and_leaves_no_trace(request_of) -> None:
    """x is the mean of all z (weights of the mean are equal at a constant rate); toggling is bit-exact."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = ScheduleFree(group_of(p), 0.1, (0.9, 0.95), 1e-8)
    zs = []
    for i in range(5):
        p.grad = torch.tensor([1.0, -2.0, 0.5 * i])
        optimizer.step()
        zs.append(optimizer.state[p]["z"].clone())
        before = p.detach().clone()
        with optim.averaged(optimizer):
            torch.testing.assert_close(p.detach(), torch.stack(zs).mean(0), rtol=1e-4, atol=1e-6)
        assert torch.equal(p.detach(), before)
    often, seldom = (
        Fit(request_of(f"e{n}", "optim.name=schedulefree", "schedule.kind=constant", f"run.eval_every={n}"))
        for n in (1, 4)
    )
    assert equal(often.tensors(), seldom.tensors())
    assert not math.isnan(often.records[-1].get("loss") or 0.0)
