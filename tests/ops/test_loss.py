"""Chunked cross-entropy: against all logits at once in fp64, values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.ops.loss import TokenLoss, linear_argmax, linear_cross_entropy, linear_token_loss
from model.ops.loss.reference import linear_cross_entropy_reference

FORMS = [
    TokenLoss(),
    TokenLoss(z=0.1),
    TokenLoss("mile"),
    TokenLoss("mile", z=0.1, gamma=0.5),
    TokenLoss("alpha"),
    TokenLoss("alpha", z=0.1, alpha=1.2),
]


def case(N: int, D: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, weight, bias, targets; every third target ignored."""
    gen = torch.Generator().manual_seed(N + 100 * D + V)
    tensors = [torch.randn(s, generator=gen, dtype=torch.float64) for s in ((N, D), (V, D), (V,))]
    targets = torch.randint(V, (N,), generator=gen)
    targets[::3] = -100
    h, weight, bias = (t.to(dtype).requires_grad_() for t in tensors)
    return h, weight, bias, targets


@settings(max_examples=50)
@given(
    st.integers(0, 30),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([1, 4, 1024]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(FORMS),
)
def test_equals_all_logits_at_once(N, D, V, chunk, weighted, biased, form):
    h, weight, bias, targets = case(N, D, V)
    weights = torch.rand(N, dtype=torch.float64) if weighted else None
    inputs = [h, weight, *([bias] if biased else [])]
    more = {"bias": bias if biased else None}
    got, ce = linear_token_loss(h, weight, targets, weights, chunk=chunk, form=form, **more)
    want = linear_cross_entropy_reference(h, weight, targets, weights, form=form, **more)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        ce, linear_cross_entropy_reference(h, weight, targets, weights, **more).detach()
    )
    # A scale other than 1, as a mean over tokens gives.
    for a, b in zip(torch.autograd.grad(0.3 * got, inputs), torch.autograd.grad(0.3 * want, inputs)):
        torch.testing.assert_close(a, b)
    each = linear_cross_entropy(h, weight, targets, weights, chunk=chunk, reduction="none", **more)
    want_each = linear_cross_entropy_reference(h, weight, targets, weights, reduction="none", **more)
    torch.testing.assert_close(each, want_each.detach())
    assert not each.requires_grad and bool((each[targets == -100] == 0).all())


def test_gradcheck():
    h, weight, bias, targets = case(7, 3, 5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_loss(h, w, targets, bias=b, form=TokenLoss("alpha", z=0.01), chunk=2)[0],
        (h, weight, bias),
    )


@pytest.mark.parametrize("form", [TokenLoss(), TokenLoss("mile", gamma=0.0), TokenLoss("alpha", alpha=1.0)])
def test_a_neutral_form_is_cross_entropy_bit_for_bit(form):
    h, weight, bias, targets = case(20, 6, 11, torch.float32)
    plain = linear_cross_entropy(h, weight, targets, bias=bias)
    loss, ce = linear_token_loss(h, weight, targets, bias=bias, form=form)
    assert form.plain and torch.equal(loss, plain) and torch.equal(ce, plain)
    for a, b in zip(*(torch.autograd.grad(x, (h, weight, bias)) for x in (loss, plain))):
        assert torch.equal(a, b)


def test_forms_weigh_hard_tokens_more():
    """mile by the entropy of the prediction, alpha by the missing probability of the target."""
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    eye, targets = torch.eye(3, dtype=torch.float64), torch.tensor([0, 0])
    slopes = {}
    for form in (TokenLoss(), TokenLoss("mile"), TokenLoss("alpha")):
        loss, _ = linear_token_loss(logits, eye, targets, form=form)
        slopes[form.kind] = torch.autograd.grad(loss, logits)[0][:, 0]
    for kind in ("mile", "alpha"):
        easy, hard = (slopes[kind] / slopes["ce"]).tolist()
        assert hard > easy
    H = -(torch.softmax(logits, -1) * torch.log_softmax(logits, -1)).sum(-1).detach()
    torch.testing.assert_close(slopes["mile"], slopes["ce"] * (1 + H))
    p = torch.softmax(logits, -1)[:, 0].detach()
    torch.testing.assert_close(slopes["alpha"], slopes["ce"] * p**-0.5 / 1.5)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_made(wanted, monkeypatch):
    h, weight, _, targets = case(8, 4, 6)
    h.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    made = []
    monkeypatch.setattr("model.ops.loss._add_product", lambda *a: made.append(a))
    loss = linear_cross_entropy(h, weight, targets)
    assert loss.requires_grad == any(wanted)
    assert bool(made) == wanted[1], "a frozen output layer costs no weight gradient"
    if any(wanted):
        loss.backward()
    assert (h.grad is not None, weight.grad is not None) == wanted


def test_bf16_operands_fp32_loss():
    h, weight, _, targets = case(2000, 64, 300)
    h = (h / 8).detach().requires_grad_()
    want = linear_cross_entropy_reference(h, weight, targets)
    low_h, master = h.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    got = linear_cross_entropy(low_h, master, targets)
    assert got.dtype == torch.float32
    got.backward()
    want.backward()
    assert low_h.grad.dtype == torch.bfloat16 and master.grad.dtype == torch.float32
    assert abs(float(got.detach()) / float(want.detach()) - 1) < 1e-3
    for mine, exact in ((low_h.grad, h.grad), (master.grad, weight.grad)):
        assert float((mine.double() - exact).norm() / exact.norm()) < 1e-2


def test_autocast_chooses_the_operands():
    h, weight, _, targets = case(20, 8, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        auto = linear_cross_entropy(h, weight, targets)
    named = linear_cross_entropy(h.bfloat16(), weight, targets)
    assert auto.dtype == torch.float32 and torch.equal(auto, named)
    auto.backward()
    assert h.grad.dtype == weight.grad.dtype == torch.float32


def test_large_logits_stay_finite():
    h, weight, _, targets = case(6, 4, 5, torch.float32)
    loss = linear_cross_entropy(h * 1e4, weight, targets)
    loss.backward()
    assert bool(loss.isfinite()) and bool(h.grad.isfinite().all()) and bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("how", ["ignored", "weight 0"])
def test_a_token_without_a_loss_may_overflow_the_form(how):
    h, weight, _, targets = case(6, 8, 11, torch.float32)
    with torch.no_grad():
        h[2] *= 400  # e^((alpha - 1) ce) is inf
    targets[2] = -100 if how == "ignored" else int((h[2] @ weight.T).argmin())
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    total, _ = linear_token_loss(h, weight, targets, weights, form=TokenLoss("alpha", alpha=2.0))
    for grad in torch.autograd.grad(total, [h, weight]):
        assert torch.isfinite(grad).all()


def test_everything_ignored():
    h, weight, _, targets = case(5, 3, 4)
    loss = linear_cross_entropy(h, weight, torch.full_like(targets, -100))
    loss.backward()
    assert float(loss.detach()) == 0 and float(h.grad.abs().max()) == 0 == float(weight.grad.abs().max())


def test_gradient_twice_from_one_graph():
    h, weight, _, targets = case(6, 3, 4)
    loss = linear_cross_entropy(h, weight, targets)
    first = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (h, weight))
    for a, b in zip(first, second):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits_of_the_batch_are_never_held(reduction):
    h, weight, _, targets = case(64, 3, 50)
    with Largest() as seen:
        loss = linear_cross_entropy(h, weight, targets, chunk=8, reduction=reduction)
        if reduction == "sum":
            loss.backward()
    assert 0 < seen.numel <= 8 * 50


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_argmax_by_chunks():
    h, weight, bias, _ = case(25, 4, 7)
    assert torch.equal(linear_argmax(h, weight, bias, chunk=6), (h @ weight.t() + bias).argmax(-1))
    assert linear_argmax(h[:0], weight).shape == (0,)


def test_wrong_shapes_are_refused():
    h, weight, _, targets = case(4, 3, 5)
    for bad in ((h[None], weight, targets), (h, weight[:, :2], targets), (h, weight, targets[:3])):
        with pytest.raises(ValueError, match="want h"):
            linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match="weights must be"):
        linear_cross_entropy(h, weight, targets, torch.ones(3))
    with pytest.raises(ValueError, match="reduction='mean'"):
        linear_cross_entropy(h, weight, targets, reduction="mean")
