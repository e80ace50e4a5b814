"""Causal convolution: the shifted form and the adapter equal the token-by-token one; that one, F.conv1d."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.core import Docs
from model.ops.conv import causal_conv
from model.ops.conv.causal_conv1d import conv_cuda, refusal
from model.ops.select import BackendError

from .layouts import random_docs

NAMES = ("x", "weight", "bias", "state")


def inputs(B, T, C, W, *, state=True, dtype=torch.float64, seed=0) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, C), (C, W), (C,), (B, C, W - 1)]
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return tensors if state else [*tensors[:3], None]


def run(fn, ins, docs=None, want_state=True, **options) -> dict[str, Tensor]:
    x, weight, bias, state = ins
    y, last = fn(x, weight, bias, activation="silu", state=state, docs=docs, want_state=want_state, **options)
    g = torch.Generator().manual_seed(9)
    out = {"y": y, "last": last} if want_state else {"y": y}
    loss = sum(
        (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)).sum() for t in out.values()
    )
    leaves = [t for t in ins if t is not None]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {**out, **{f"d{n}": g for n, g in zip(NAMES, grads)}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tol: float = 1e-10) -> None:
    for name, ref in want.items():
        torch.testing.assert_close(got[name], ref, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 12), st.integers(1, 3), st.integers(1, 5),
    st.booleans(), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_shifts_equal_reference(B, T, C, W, state, packed, seed):
    ins = inputs(B, T, C, W, state=state, seed=seed)
    docs = random_docs(B, T, seed) if packed and T else None
    assert_same(
        run(causal_conv, ins, docs, backend="shifts"), run(causal_conv, ins, docs, backend="reference")
    )


def test_reference_is_a_depthwise_convolution():
    x, weight, bias, state = inputs(2, 9, 3, 4)
    line = torch.cat([state, x.transpose(1, 2)], 2)
    want = F.silu(F.conv1d(line, weight[:, None], bias, groups=3)).transpose(1, 2)
    y, last = causal_conv(
        x, weight, bias, activation="silu", state=state, want_state=True, backend="reference"
    )
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, line[:, :, -3:])


def test_padding_is_not_read_even_if_it_is_not_a_number():
    segments = torch.tensor([[-1, -1, 0, 0, 1, -1]])
    docs = Docs.from_segments(segments, torch.zeros_like(segments))
    ins = inputs(1, 6, 2, 4)
    want = run(causal_conv, ins, docs)
    spoilt = ins[0].detach().clone()
    spoilt[segments < 0] = float("nan")
    got = run(causal_conv, [spoilt.requires_grad_(), *ins[1:]], docs)
    assert_same(got, want, 0)
    assert not got["y"][segments < 0].any() and not got["dx"][segments < 0].any()


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision(dtype, tol):
    ins = inputs(2, 50, 8, 4, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in ins]
    got, want = run(causal_conv, ins), run(causal_conv, exact, backend="reference")
    for name, ref in want.items():
        assert (got[name].double() - ref).norm() <= tol * ref.norm(), name
        assert got[name].dtype == dtype, name


def test_what_does_not_fit_is_refused():
    x, weight, bias, state = inputs(2, 5, 3, 4)
    with pytest.raises(ValueError, match="do not fit 3 channels"):
        causal_conv(x, weight[:2], bias)
    with pytest.raises(ValueError, match=r"state must be \(2, 3, 3\)"):
        causal_conv(x, weight, bias, state=state[:, :, 1:])
    with pytest.raises(ValueError, match="activation must be"):
        causal_conv(x, weight, bias, activation="gelu")
    with pytest.raises(BackendError, match="causal_conv1d"):
        causal_conv(x, weight, bias, backend="causal_conv1d")


def test_adapter_refuses_what_the_kernel_cannot_do():
    x, docs = torch.zeros(2, 5, 8), Docs.whole(2, 5)
    assert "state across packed" in refusal(x, width=4, stateful=True, docs=docs)
    assert "2 to 4 wide" in refusal(x, width=5, stateful=False, docs=None)
    assert "multiple of 8" in refusal(x[..., :3], width=4, stateful=False, docs=None)
    assert "CUDA" in refusal(x, width=4, stateful=True, docs=None)


@pytest.mark.parametrize(("state", "packed", "want_state"), [(0, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0)])
def test_adapter_bookkeeping(monkeypatch, state, packed, want_state):
    """The adapter around a stand-in for the kernel: channel-first, `seq_idx`, no state beside it."""

    def causal_conv1d_fn(
        x, weight, bias, seq_idx=None, initial_states=None, return_final_states=False, activation=None
    ):
        assert x.stride(1) == 1 and (seq_idx is None or (initial_states is None and not return_final_states))
        assert initial_states is None or initial_states.stride(1) == 1
        docs = None if seq_idx is None else Docs.from_segments(seq_idx.long(), torch.zeros_like(seq_idx))
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
        y, last = causal_conv(x.mT, weight, bias, activation=activation, state=initial_states, docs=docs,
                              want_state=return_final_states)  # fmt: skip
        return (y.mT, last) if return_final_states else y.mT

    fake = types.ModuleType("causal_conv1d")
    fake.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", fake)
    for seed in range(4):
        ins = inputs(2, 12, 8, 4, state=bool(state), seed=seed)
        docs = random_docs(2, 12, seed) if packed else None
        got = run(conv_cuda, ins, docs, want_state=bool(want_state))
        assert_same(got, run(causal_conv, ins, docs, want_state=bool(want_state), backend="reference"))
