"""What the backward pass keeps: checkpointed sites, compressed activations, released gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import model
from model.schema import ConfigError
from model.sections import ActivationsConfig, OptimConfig
from tests.train.conftest import Fit, equal
from train import activations, optim
from train.activations import GROUP, compress, restore
from train.errors import UserError
from train.optim.adalomo import AdaLomo
from train.optim.release import Release

SHARED = {
    "dim": 32,
    "stack": [{"repeat": 2, "tied": True, "of": [{"attention": {"head_dim": 16}}, "mlp"]}],
    "heads": {"next": {"shift": 1}},
}


def lm_of(seed: int = 0, **rest) -> model.LanguageModel:
    torch.manual_seed(seed)
    return model.build(SHARED | rest, vocab=40).train()


def loss_of(lm) -> torch.Tensor:
    tokens = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(1))
    return lm(tokens, labels=tokens).loss


def gradients(lm) -> dict[str, torch.Tensor]:
    lm.zero_grad()
    loss_of(lm).backward()
    return {n: p.grad.clone() for n, p in lm.named_parameters()}


class Saved:
    """Bytes that autograd keeps, weights not counted, each storage once."""

    def __init__(self, lm) -> None:
        self.found: dict[int, int] = {}
        self._weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        where = t.untyped_storage()
        if where.data_ptr() not in self._weights:
            self.found[where.data_ptr()] = where.nbytes()
        return t

    @property
    def bytes(self) -> int:
        return sum(self.found.values())


def saved_bytes(lm) -> int:
    saved = Saved(lm)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        loss = loss_of(lm)
    assert loss.requires_grad
    return saved.bytes


def test_checkpointed_sites_give_the_same_gradients_and_keep_less() -> None:
    plain, again = lm_of(), lm_of()
    assert activations.install(again, ActivationsConfig(["mlp", "attention"]), torch.device("cpu")) is None
    assert len(again.around) == 4  # a site each, of two shared modules
    assert equal(gradients(plain), gradients(again))
    assert saved_bytes(again) < 0.4 * saved_bytes(plain)
    one = lm_of()
    activations.install(one, ActivationsConfig(["b1_mlp#2"]), torch.device("cpu"))
    assert len(one.around) == 1 and saved_bytes(again) < saved_bytes(one) < saved_bytes(plain)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.sampled_from([2, 4, 8]), st.floats(-3, 3), st.floats(0.01, 100))
def test_codes_stay_within_a_step_and_are_counted(n, bits, shift, scale) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * scale + shift
    packed = compress(x, bits)
    groups = -(-n // GROUP)
    assert packed.bytes == groups * (GROUP * bits // 8 + 8)
    back = restore(packed, bits, x.shape, x.dtype)
    step = packed.step.expand(-1, GROUP).flatten()[:n]
    assert bool(((back - x).abs() <= step * 1.001 + 1e-5 * scale).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_unbiased(bits) -> None:
    x, gen = torch.randn(512), torch.Generator().manual_seed(0)
    draws = torch.stack([restore(compress(x, bits, gen), bits, x.shape, x.dtype) for _ in range(2000)])
    error = (draws.mean(0) - x).abs()
    assert bool((error <= 5 * draws.std(0) / 2000**0.5 + 1e-4).all())


@pytest.mark.parametrize("bits", [2, 4])
def test_compressed_layers_are_exact_forward_unbiased_backward_and_small(bits) -> None:
    plain, small = lm_of(), lm_of()
    noise = activations.install(small, ActivationsConfig(bits=bits), torch.device("cpu"))
    assert noise is not None
    want, got, squares, rounds = gradients(plain), {}, {}, 60
    assert torch.equal(loss_of(plain), loss_of(small))
    for i in range(rounds):
        noise.begin(i)
        for name, g in gradients(small).items():
            got[name] = got.get(name, 0) + g / rounds
            squares[name] = squares.get(name, 0) + g.square() / rounds
    noise.begin(0)
    first = gradients(small)
    noise.begin(0)
    assert equal(first, gradients(small))  # rounding follows from the step
    for name, g in want.items():
        if ".mlp" not in name and "_mlp" not in name:
            assert torch.equal(got[name] * 0 + first[name], g), name  # nothing else is touched
        elif name.endswith("proj.weight"):
            sigma = (squares[name] - got[name].square()).clamp_min(0).sqrt() / rounds**0.5
            inside = ((got[name] - g).abs() <= 3 * sigma + 1e-6).float().mean()
            assert inside > 0.98, (name, float(inside))
            wide = 2 if "down_proj" in name else 1  # its input has the longer tails
            assert float((first[name] - g).norm() / g.norm()) < wide * {2: 0.75, 4: 0.15}[bits], name
    assert saved_bytes(small) < saved_bytes(plain)


def test_unknown_names_are_refused() -> None:
    for config in (ActivationsConfig(["mpl"]), ActivationsConfig(bits=4, only=["atention"])):
        with pytest.raises(ConfigError, match="did you mean"):
            activations.install(lm_of(), config, torch.device("cpu"))


# ----------------------------------------------------------------------------- gradient release


@pytest.mark.parametrize("name", ["adalomo", "stableadamw", "lion", "adan"])
def test_released_gradients_make_the_same_step_and_resume(request_of, name) -> None:
    """On an onion whose shells are visited twice: the plain step, without the gradients."""
    more = ("optim.betas=[0.98, 0.92, 0.99]",) if name == "adan" else ()
    sets = (f"optim.name={name}", "optim.clip=0", "run.micro=4", "optim.lr=1e-3", *more)
    plain = Fit(request_of("plain", *sets, arch="mixed"))
    whole = Fit(request_of("whole", *sets, "optim.release=true", arch="mixed"))
    for key, value in whole.state.model_tensors().items():
        torch.testing.assert_close(value, plain.state.model_tensors()[key], rtol=1e-4, atol=1e-6, msg=key)
    norms = [[r["grad_norm"] for r in f.records if r["kind"] == "train"] for f in (plain, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    Fit(request_of("parts", *sets, "optim.release=true", arch="mixed"), stop_after=5)
    parts = Fit(request_of("parts", *sets, "optim.release=true", arch="mixed", resume=True))
    assert equal(whole.tensors(), parts.tensors())


def test_a_released_gradient_that_is_not_finite_leaves_weights_that_are() -> None:
    layer = torch.nn.Linear(2, 2)
    release = Release(optim.build(layer, OptimConfig(name="adalomo", clip=0.0), set(), {}))
    release.begin()
    y = layer(torch.ones(1, 2))
    loss = (y - y.detach()).abs().sum().sqrt()  # 0, and its slope is not a number
    loss.backward()
    assert bool(loss.isfinite()) and math.isnan(release.norm())
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def test_release_never_holds_two_gradients() -> None:
    lm = lm_of()
    optimizer = optim.build(lm, lm.config.optim.__class__(name="adalomo"), lm.no_decay(), {})
    release, most = Release(optimizer), []
    real = optimizer.step

    def step(param=None):
        most.append(sum(p.grad is not None for p in lm.parameters()))
        real(param=param)

    optimizer.step = step  # type: ignore[method-assign]
    optim.set_lr(optimizer, 1e-3)
    release.begin()
    loss_of(lm).backward()
    assert set(most) == {1} and len(most) == len(list(lm.parameters()))
    assert all(p.grad is None for p in lm.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_of_a_shared_weight_is_refused(reentrant) -> None:
    layer = nn.Linear(4, 4, bias=False)
    group = {"params": [layer.weight], "names": ["w"], "lr_scale": 1.0, "weight_decay": 0.0}
    release = Release(AdaLomo([group], 1e-3))
    release.begin()
    x = torch.randn(3, 4, requires_grad=True)
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    if reentrant:
        with pytest.raises(UserError, match="updated twice"):
            x.sum().backward()
    else:
        x.sum().backward()
        assert release.norm() > 0
