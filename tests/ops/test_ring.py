"""The ring of past states: batched form beside the token-by-token one, and what it does to mamba2.

Shape legend: B batch  T time  H heads  P head width  G groups  N state width
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.ops.attention import Places
from model.ops.ring import RingState, ring_read
from model.ops.ssd import ssd
from model.registry import make_block

from .layouts import random_docs

H, P, G, N = 4, 3, 2, 5


def leaves(B: int, T: int, seed: int, decay: float = 0.5) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, P), (B, T, H), *[(B, T, G, N)] * 3]
    x, a, b, c, u = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return [t.requires_grad_() for t in (x, -decay * a.abs(), b, c, u)]


def run(ins: list[Tensor], backend: str, state: bool, **sizes) -> list[Tensor]:
    start = RingState.empty(ins[0], len(ins[0]), sizes["slots"], H, P, G, N) if state else None
    y, after = ring_read(*ins, state=start, backend=backend, **sizes)
    outs = [y, *(after[:-1] if after is not None else [])]
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in outs)
    loss = loss + sum(t.sum() for t in ins)  # a path to every one, even where nothing is read yet
    grads = torch.autograd.grad(loss, ins)
    return [*outs, *([after.seen] if after is not None else []), *grads]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 30), st.integers(1, 4), st.sampled_from([1, 2, 3, 5, 40]),
    st.booleans(), st.integers(0, 9999),
)  # fmt: skip
def test_batched_equals_the_reference(B, T, slots, stride, state, seed):
    at = Places.of(random_docs(B, T, seed))
    ins, sizes = leaves(B, T, seed), {"slots": slots, "stride": stride, "at": at}
    for a, b in zip(run(ins, "cpu", state, **sizes), run(ins, "reference", state, **sizes)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("forget", [-50.0, -torch.inf])
def test_forgetting_stays_finite(forget):
    ins = leaves(1, 24, 3)
    with torch.no_grad():
        ins[1][:, ::3] = forget
    at = Places(torch.arange(24)[None], torch.zeros(1, 24, dtype=torch.int64))
    got, want = (run(ins, b, True, slots=2, stride=6, at=at) for b in ("cpu", "reference"))
    for a, b in zip(got, want):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_segments_add_up_to_the_recurrence():
    """Without decay and for u = 0 every segment weighs 1 / (1 + how many): the state itself, scaled."""
    x, a, b, c, u = leaves(1, 20, 0, decay=0.0)
    at = Places(torch.arange(20)[None], torch.zeros(1, 20, dtype=torch.int64))
    r, _ = ring_read(x, a, b, c, u * 0, slots=4, stride=5, at=at)
    for t in range(20):
        n = t // 5
        _, S = ssd(x[:, : 5 * n], a[:, : 5 * n], b[:, : 5 * n], c[:, : 5 * n], want_state=True)
        want = torch.einsum("bhn,bhnp->bhp", c[:, t].repeat_interleave(H // G, 1), S) / (1 + n)
        torch.testing.assert_close(r[:, t], want)


def test_a_new_ring_changes_nothing_and_then_reaches_past_the_decay():
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "state": 4, "chunk": 8}
    plain = make_block("mamba2", 16, **sizes).double()
    ringed = make_block("mamba2", 16, ring={"slots": 4, "stride": 4}, **sizes).double()
    missing, unknown = ringed.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["ring_gain", "ring_proj.weight"] and not unknown
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    assert torch.equal(plain(x).y, ringed(x).y)
    with torch.no_grad():
        for m in (plain, ringed):
            m.A_log.fill_(8.0)  # everything is forgotten at once
        ringed.ring_gain.fill_(1.0)
    x.requires_grad_()
    (old,) = torch.autograd.grad(plain(x).y[:, -1].sum(), x)
    (new,) = torch.autograd.grad(ringed(x).y[:, -1].sum(), x)
    assert old[:, 5].abs().max() < 1e-12 < 1e-6 < new[:, 5].abs().max()


def test_a_ring_names_its_sizes():
    for ring in ({"slots": 4}, {"slots": 0, "stride": 4}, {"slots": 4, "stride": 4, "size": 1}):
        with pytest.raises(ValueError, match=r"must be \{slots: R, stride: s\}"):
            make_block("mamba2", 64, ring=ring)
