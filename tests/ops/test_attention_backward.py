"""The bf16 gradient of attention on a CPU against SDPA's in fp64, and against torch's own in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.ops.attention import backward
from model.ops.attention.cpu import attend_cpu

CASES = settings(max_examples=25, deadline=None)


def inputs(B: int, T: int, S: int, H: int, G: int, K: int, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, K), (B, G, S, K), (B, G, S, K)
    return [torch.randn(s, generator=gen).bfloat16().requires_grad_() for s in shapes]


def gradients(x: list[Tensor], mask: Tensor | None, dy: Tensor, ours: bool) -> tuple[Tensor, ...]:
    if ours:
        assert backward.serves(x[0], x[1], mask)
        y = backward.attention(*x, mask, None)
    else:
        y = F.scaled_dot_product_attention(*x, mask, is_causal=mask is None, enable_gqa=True)
    return torch.autograd.grad(y, x, dy.to(y.dtype))


def far(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm().clamp(min=1e-6))


@CASES
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 63, 128, 129, 200, 300]),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.sampled_from([None, "own", "shared"]),
    st.integers(0, 20),
)
def test_gradients_are_those_of_fp64(B, T, heads, kind, seed):
    """As near as torch's own bf16 gradient, within a factor: both keep P and dS in bf16."""
    assume(kind is None or T <= backward.MOST_MASKED)
    S = T if kind is None else T + seed
    x = inputs(B, T, S, *heads, 16, seed)
    mask = None
    if kind is not None:
        mask = (
            torch.rand(B if kind == "own" else 1, 1, T, S, generator=torch.Generator().manual_seed(seed))
            > 0.6
        )
        mask[..., T // 2, :] = False  # a row that sees nothing
    dy = torch.randn(B, heads[0], T, 16, generator=torch.Generator().manual_seed(seed + 1)).bfloat16()
    exact = [t.detach().double().requires_grad_() for t in x]
    want = gradients(exact, mask, dy, ours=False)
    found = gradients(x, mask, dy, ours=True)
    for a, b, name in zip(found, want, "qkv"):
        assert torch.isfinite(a).all()
        # With one key the weights are 1 and the gradients of q and k are 0, but for rounding.
        assert far(a, b) < 0.015 or float((a - b).abs().max()) < 0.02, (name, far(a, b))
    if mask is not None:
        assert float(found[0][:, :, T // 2].abs().max()) == 0


def test_memory_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients whatever a chunk holds."""
    x = inputs(3, 150, 150, 4, 2, 16)
    dy = torch.randn(3, 4, 150, 16).bfloat16()
    want = gradients(x, None, dy, ours=True)
    monkeypatch.setattr(backward, "CHUNK", 4 * 128 * 128)
    for a, b in zip(gradients(x, None, dy, ours=True), want):
        torch.testing.assert_close(a, b)


def test_who_is_served() -> None:
    q, k, _ = inputs(1, 8, 8, 2, 1, 16)
    assert backward.serves(q, k, None) and backward.serves(q, k, torch.ones(1, 1, 8, 8, dtype=torch.bool))
    assert not backward.serves(q, k, torch.zeros(1, 2, 8, 8))  # ALiBi's float mask
    assert not backward.serves(q.float(), k.float(), None)
    assert not backward.serves(q[:, :, :0], k, None)
    assert not backward.serves(inputs(1, backward.MOST + 1, 8, 2, 1, 16)[0], k, None)
    with torch.no_grad():
        assert not backward.serves(q, k, None)


@pytest.mark.parametrize("window", [None, 16])
def test_attend_uses_it_under_autocast_and_compiled(window: int | None) -> None:
    """The same operator, traced or not; autocast does not reach into it."""
    made = inputs(2, 80, 80, 4, 2, 16)
    x = [t.detach().transpose(1, 2).requires_grad_() for t in made]

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = attend_cpu(*x, window=window)
            return (y.float() ** 2).sum()

    eager = torch.autograd.grad(loss(), x)
    traced = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(), x)
    for a, b in zip(traced, eager):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    with torch.profiler.profile() as seen:
        loss().backward()
    assert any("attention_backward" in e.key for e in seen.key_averages())


def test_products_are_counted() -> None:
    """Causal blocks against the keys up to them: less than the whole square."""
    x = inputs(2, 256, 256, 4, 4, 16)
    y = backward.attention(*x, None, None)
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == 2 * 2 * 4 * (128 * 128 + 128 * 256) * 5 * 16
