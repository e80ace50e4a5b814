"""The state-space dual: every form equals the token-by-token recurrence, and that one its closed form.

Shape legend: B batch  T time  H heads  P head width  G groups  N state width.
"""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.core import Docs
from model.ops.select import BackendError
from model.ops.ssd import ssd, ssd_flops
from model.ops.ssd.fla import ssd_fla

from .layouts import random_docs

NAMES = ("x", "log_a", "b", "c", "state")


def inputs(B, T, H, P, G, N, *, state=True, dtype=torch.float64, decay=0.3, seed=0) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, P), (B, T, H), (B, T, G, N), (B, T, G, N), (B, H, N, P)]
    x, log_a, b, c, S = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    tensors = [x, -decay * log_a.abs(), b, c, S if state else None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = (dtype, wide, dtype, dtype, wide)
    return [None if t is None else t.to(d).requires_grad_() for t, d in zip(tensors, dtypes)]


def run(fn, ins, docs=None, seed=9, **options) -> dict[str, Tensor]:
    """Output, final state and every gradient of one random projection of both."""
    *main, state = ins
    y, last = fn(*main, state=state, docs=docs, want_state=True, **options)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, last)]
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    leaves = [t for t in ins if t is not None]
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
    return {"y": y, "last": last, **{f"d{n}": g for n, g in zip(NAMES, grads)}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    for name, ref in want.items():
        assert got[name].shape == ref.shape, name
        if not ref.numel():
            continue
        off = (got[name].double() - ref.double()).norm() / (1e-6 + ref.double().norm())
        assert off <= tol, f"{name}: relative error {off:.2e}, allowed {tol:g}"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 150), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([1, 7, 16, 64, 153]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_chunked_equals_reference(B, T, heads, P, N, state, packed, chunk, seed):
    H, G = heads
    ins = inputs(B, T, H, P, G, N, state=state, seed=seed)
    docs = random_docs(B, T, seed) if packed and T else None
    want = run(ssd, ins, docs, backend="reference")
    assert_same(run(ssd, ins, docs, backend="chunked", chunk=chunk), want, 1e-9)


def test_reference_is_the_masked_attention_it_is_dual_to():
    x, log_a, b, c, _ = inputs(2, 12, 4, 3, 2, 5, state=False)
    L = log_a.cumsum(1).permute(0, 2, 1)  # [B, H, T]
    decay = (L[..., :, None] - L[..., None, :]).exp().tril()
    bh, ch = b.repeat_interleave(2, 2), c.repeat_interleave(2, 2)
    want = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", ch, bh, decay, x)
    y, last = ssd(x, log_a, b, c, want_state=True, backend="reference")
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, torch.einsum("bjhn,bhj,bjhp->bhnp", bh, decay[:, :, -1], x))


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("packed", [False, True])
def test_precision(dtype, tol, packed):
    ins = inputs(2, 200, 4, 16, 1, 16, dtype=dtype)
    docs = random_docs(2, 200, 3) if packed else None
    exact = [t.detach().double().requires_grad_() for t in ins]
    assert_same(run(ssd, ins, docs, backend="chunked"), run(ssd, exact, docs, backend="reference"), tol)


@pytest.mark.parametrize("decay", [0.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_decay_stays_finite(decay, dtype):
    ins = inputs(2, 130, 2, 4, 1, 4, dtype=dtype, decay=decay)
    got = run(ssd, ins, random_docs(2, 130, 1), backend="chunked")
    assert all(torch.isfinite(t).all() for t in got.values())


@pytest.mark.parametrize("forget", [-50.0, -3e4, -torch.inf])
@pytest.mark.parametrize("packed", [False, True])
def test_what_follows_forgetting_is_exact(forget, packed):
    """After tokens that forget everything, slow decays count to fp32's precision, in every chunk of a row."""
    ins = inputs(2, 400, 2, 4, 1, 4, dtype=torch.float32, decay=0.01)
    with torch.no_grad():
        ins[1][:, 60:150:2], ins[1][:, 151:170] = forget, forget
    docs = random_docs(2, 400, 3) if packed else None
    exact = [t.detach().double().requires_grad_() for t in ins]
    assert_same(run(ssd, ins, docs, backend="chunked"), run(ssd, exact, docs, backend="reference"), 3e-6)


def test_gradcheck_with_documents_and_state():
    docs = random_docs(2, 9, 4)
    ins = inputs(2, 9, 2, 2, 1, 2)
    assert torch.autograd.gradcheck(
        lambda *t: ssd(*t[:4], state=t[4], docs=docs, want_state=True, chunk=4, backend="chunked"),
        ins,
        fast_mode=True,
    )


def test_padding_is_not_read_even_if_it_is_not_a_number():
    segments = torch.tensor([[-1, -1, 0, 0, 0, 1, -1]])
    docs = Docs.from_segments(segments, torch.zeros_like(segments))
    ins = inputs(1, 7, 2, 3, 1, 4)
    want = run(ssd, ins, docs, backend="chunked")
    pad = segments < 0
    spoilt = [t.detach().clone() for t in ins]
    for t in spoilt[:4]:
        t[pad] = float("nan")
    got = run(ssd, [t.requires_grad_() for t in spoilt], docs, backend="chunked")
    assert_same(got, want, 0)
    assert not got["y"][pad].any() and not got["dx"][pad].any()


def test_documents_are_isolated_bit_for_bit():
    docs = Docs.packed([0, 30, 31, 70, 100])
    x, log_a, b, c, _ = inputs(1, 100, 2, 4, 1, 4, dtype=torch.float32)
    y, _ = ssd(x, log_a, b, c, docs=docs, chunk=16)
    louder = log_a.detach().clone()
    louder[:, :30] *= 100
    other, _ = ssd(x, louder, b, c, docs=docs, chunk=16)
    assert torch.equal(other[:, 30:], y[:, 30:]) and not torch.equal(other[:, :30], y[:, :30])
    (leak,) = torch.autograd.grad(y[:, 31:70].sum(), log_a)
    assert not leak[:, :31].any() and not leak[:, 70:].any() and leak[:, 31:70].any()


def test_the_state_is_kept_in_fp32_by_bf16_calls():
    """A stream cut into many bf16 calls with slow decay: a bf16 state would lose what it holds."""
    x, log_a, b, c, _ = inputs(1, 1024, 2, 16, 1, 16, dtype=torch.bfloat16, decay=1e-3)
    x, b, c = (t.detach().abs().to(torch.bfloat16) for t in (x, b, c))
    state = None
    for t in range(0, 1024, 8):
        part = (v[:, t : t + 8] for v in (x, log_a, b, c))
        _, state = ssd(*part, state=state, want_state=True)
    _, want = ssd(x.double(), log_a.double(), b.double(), c.double(), want_state=True, backend="reference")
    assert state.dtype == torch.float32
    assert (state - want).norm() / want.norm() < 5e-3


def test_autocast_does_not_reach_inside():
    ins = inputs(2, 100, 2, 8, 1, 8, dtype=torch.float32)
    want = run(ssd, ins)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(ssd, ins), want, 0)


def test_equals_transformers_scan():
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    u, _, b, c, _ = (
        t.detach() if t is not None else None for t in inputs(2, 100, 4, 8, 2, 8, dtype=torch.float32)
    )
    dt, A = torch.rand(2, 100, 4) * 0.1, -torch.arange(1.0, 5.0)
    want, state = mamba2_chunk_scan(u, dt, A, b, c, chunk_size=32, return_final_states=True)
    y, last = ssd(u * dt[..., None], dt * A, b, c, want_state=True)
    assert_same({"y": y, "last": last}, {"y": want, "last": state.mT}, 1e-5)


@pytest.mark.parametrize("T", [1, 5, 64, 100, 200])
def test_flops_equal_the_counter(T):
    x, log_a, b, c, _ = inputs(3, T, 4, 8, 2, 5, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        ssd(x, log_a, b, c, backend="chunked")
    assert counter.get_total_flops() == 3 * ssd_flops(T, 4, 8, 2, 5)


def test_a_named_backend_never_falls_back():
    x, log_a, b, c, _ = inputs(1, 4, 2, 3, 1, 4)
    with pytest.raises(
        BackendError, match=r"'fla' cannot serve.*\n.*CUDA tensors, got cpu(.*\n)*  chunked: can"
    ):
        ssd(x, log_a, b, c, backend="fla")
    with pytest.raises(BackendError, match="no backend called 'flaa'"):
        ssd(x, log_a, b, c, backend="flaa")


def test_shapes_that_do_not_fit_are_refused():
    x, log_a, b, c, _ = inputs(1, 4, 3, 3, 1, 4)
    with pytest.raises(ValueError, match=r"log_a must be \(1, 4, 3\)"):
        ssd(x, log_a[:, :2], b, c)
    with pytest.raises(ValueError, match="3 heads do not divide into 2 groups"):
        ssd(x, log_a, b.expand(1, 4, 2, 4), c.expand(1, 4, 2, 4))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_fla_adapter_bookkeeping(monkeypatch, state, seed):
    """The adapter around a stand-in for fla's kernel that knows its `cu_seqlens` and nothing of ours."""

    def chunk_simple_gla(q, k, v, g, scale, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert scale == 1.0
        if cu_seqlens is None:
            return ssd(v, g, k, q, state=initial_state, want_state=output_final_state)
        ends = cu_seqlens.tolist()
        runs = [slice(a, b) for a, b in itertools.pairwise(ends)]
        parts = [
            ssd(v[:, r], g[:, r], k[:, r], q[:, r], want_state=True,
                state=None if initial_state is None else initial_state[i : i + 1])
            for i, r in enumerate(runs)
        ]  # fmt: skip
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])

    fake = types.ModuleType("fla.ops.simple_gla")
    fake.chunk_simple_gla = chunk_simple_gla
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", fake)
    docs = random_docs(3, 20, seed) if seed else None
    ins = inputs(3, 20, 4, 3, 2, 5, state=state, dtype=torch.float32)
    assert_same(run(ssd_fla, ins, docs), run(ssd, ins, docs, backend="reference"), 1e-5)


@pytest.mark.gpu
def test_fla_on_a_gpu():
    ins = [t.detach().cuda().requires_grad_() for t in inputs(2, 200, 4, 32, 1, 32, dtype=torch.float32)]
    docs = random_docs(2, 200, 3).to("cuda")
    assert_same(run(ssd, ins, docs, backend="fla"), run(ssd, ins, docs, backend="reference"), 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_ssd_compiles_without_a_break(packed):
    ins = inputs(2, 130, 4, 8, 1, 8, dtype=torch.float32)
    docs = random_docs(2, 130, 3) if packed else None
    compiled = torch.compile(ssd, fullgraph=True)
    assert_same(run(compiled, ins, docs), run(ssd, ins, docs), 1e-5)
