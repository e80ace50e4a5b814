"""Guessing ahead: the learned jump with its gate, and the Wiener gain as its control."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from experiments.nowcast.fit import fit
from model.sections import NowcastConfig
from tests.train.conftest import Fit, equal
from train.nowcast import Nowcast, NowcastNet, features, moves
from train.optim.wiener import shrink, wiener_gain


def steered(value: float, history: int) -> NowcastNet:
    """A network that guesses `value` scales for every coordinate."""
    net = NowcastNet(history)
    nn.init.constant_(net.out.bias, value)
    return net


def run(net: NowcastNet, better: bool) -> tuple[nn.Linear, Nowcast, torch.Tensor]:
    """Two snapshots of a layer, then a jump whose gate says `better`; the weights before it."""
    layer = nn.Linear(3, 2)
    cast = Nowcast(NowcastConfig(every=1, history=2, gate=100), layer, torch.device("cpu"))
    cast.net = net
    losses = iter([2.0, 1.0] if better else [1.0, 2.0])
    for step in (1, 2):
        with torch.no_grad():
            layer.weight.add_(0.1)
            before = layer.weight.clone()
        cast.maybe_jump(SimpleNamespace(step=step), lambda state, tokens: (next(losses), tokens))
    return layer, cast, before


def test_a_jump_that_loses_is_taken_back_bit_for_bit() -> None:
    layer, cast, before = run(steered(1.0, 2), better=False)
    assert torch.equal(layer.weight, before) and (cast.taken, cast.refused) == (0, 1)
    assert cast.gate_tokens == 200 and cast.news is not None and cast.news["better"] is False


def test_a_jump_that_wins_stays_and_starts_a_new_path() -> None:
    layer, cast, before = run(steered(1.0, 2), better=True)
    torch.testing.assert_close(layer.weight.detach(), before + 0.1)  # one scale: the root mean square step
    assert (cast.taken, cast.refused, cast.kept) == (1, 0, [])


def test_the_guess_scales_with_the_path() -> None:
    net = NowcastNet(4)
    nn.init.normal_(net.out.weight)
    path = [torch.randn(5, 3) for _ in range(4)]
    torch.testing.assert_close(moves(net, [8.0 * w for w in path]), 8.0 * moves(net, path))
    assert bool((moves(net, [path[0]] * 4) == 0).all())  # nothing moved, nothing is guessed


def test_rollback_in_a_run_is_as_if_nothing_happened(request_of, tmp_path) -> None:
    save_file(steered(50.0, 2).state_dict(), tmp_path / "wild.safetensors")
    plain = Fit(request_of("plain"))
    wild = Fit(
        request_of("wild", f"nowcast={{every: 3, history: 2, gate: 64, net: {tmp_path}/wild.safetensors}}")
    )
    assert equal(plain.tensors(), wild.tensors())
    news = [r for r in wild.records if r.get("event") == "nowcast"]
    assert news and news[-1]["refused"] == len(news) == 3 and news[-1]["gate_tokens"] == 2 * 64 * 3


def test_fitting_learns_paths_that_flatten_out() -> None:
    """Weights that relax as 1 - e^(-t/tau): the fitted network beats staying and beats going straight on."""
    gen = torch.Generator().manual_seed(0)

    def path(n: int) -> list[torch.Tensor]:
        goal, start = torch.randn(n, generator=gen), torch.randn(n, generator=gen)
        return [goal + (start - goal) * 0.8**t for t in range(9)]

    net = fit([path(400) for _ in range(6)], history=4, ahead=4, steps=150, seed=0)
    trial = path(500)
    guess, truth = moves(net, trial[:4]), trial[7] - trial[3]
    straight = 4 * (trial[3] - trial[2])
    error = (guess - truth).norm() / truth.norm()
    assert error < 0.25 and (straight - truth).norm() / truth.norm() > 2 * error


def test_features_are_differences_in_units_of_the_mean_step() -> None:
    x, scale = features([torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])])
    assert float(scale) == pytest.approx((25 / 2) ** 0.5)
    torch.testing.assert_close(x[:, 0], torch.tensor([-3.0, -4.0]) / scale)


def test_the_wiener_gain_is_the_best_linear_estimate() -> None:
    """Over many draws of g = mu + noise, no other factor on g comes nearer to mu."""
    gen = torch.Generator().manual_seed(0)
    mu, sigma = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([1.0, 0.5, 2.0])
    g = mu + sigma * torch.randn(200_000, 3, generator=gen)
    gain = wiener_gain(mu, mu.square() + sigma.square())
    torch.testing.assert_close(gain, mu.square() / (mu.square() + sigma.square()))
    errors = {f: ((gain * f * g - mu) ** 2).mean(0) for f in (0.8, 1.0, 1.2)}
    assert bool((errors[1.0][:2] < errors[0.8][:2]).all() and (errors[1.0][:2] < errors[1.2][:2]).all())
    four = wiener_gain(mu, mu.square() + sigma.square(), batches=4)
    torch.testing.assert_close(four[:2], (mu**2 / (mu**2 + sigma**2 / 4))[:2])
    assert float(wiener_gain(torch.zeros(1), torch.zeros(1))) == 1.0


def test_shrinking_uses_the_unbiased_moments_before_the_step() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95))
    grads = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    m, v = torch.zeros(4), torch.zeros(4)
    for t, g in enumerate(grads):
        p.grad = g.clone()
        shrink(optimizer)
        if t == 0:
            assert torch.equal(p.grad, g)
        else:
            torch.testing.assert_close(p.grad, g * wiener_gain(m / (1 - 0.9**t), v / (1 - 0.95**t)))
        m, v = 0.9 * m + 0.1 * p.grad, 0.95 * v + 0.05 * p.grad**2
        optimizer.step()


def test_the_gate_scores_rows_packed_as_the_run_s_are(request_of, monkeypatch) -> None:
    import train.hooks

    views, real = [], train.hooks.evaluate
    monkeypatch.setattr(
        train.hooks, "evaluate", lambda lm, view, *rest: (views.append(view), real(lm, view, *rest))[1]
    )
    done = Fit(request_of("run", "run.packing=documents", "nowcast={every: 2, history: 2, gate: 100}"))
    assert len({id(v) for v in views}) == 2  # the evaluation's and the gate's
    assert {v.rows for v in views} == {done.stage.heldout.rows}
    (*_, last) = (r for r in done.records if r.get("event") == "nowcast")
    assert last["gate_tokens"] == (last["taken"] + last["refused"]) * 2 * 96  # 3 whole rows of 32
