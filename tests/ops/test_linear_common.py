"""What holds for every operator of the linear family: the fast form is the recurrence, for any layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model.core import Docs
from model.ops.linear import delta_flops, gla_flops, simple_gla_flops
from model.ops.select import BackendError

from .linear_cases import OPS, assert_close, make_call, random_docs, results

every_op = pytest.mark.parametrize("op", OPS)


@every_op
@settings(max_examples=12)
@given(
    B=st.integers(1, 3),
    T=st.integers(0, 150),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    decay=st.sampled_from([0.0, 0.2, 3.0, 60.0]),
    state=st.booleans(),
    seed=st.integers(0, 999),
)
def test_chunked_equals_the_recurrence(op, B, T, K, V, decay, state, seed) -> None:
    """Outputs, final state and every gradient in fp64, with documents, padding and ragged lengths."""
    docs = random_docs(B, T, seed)
    call = make_call(op, B, T, K=K, V=V, decay=decay, seed=seed, docs=docs, state=state)
    assert_close(results(call), results(call.to(torch.float64), "reference"), 1e-10)


@every_op
@pytest.mark.parametrize("decay", [0.1, 2.0, 50.0])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.bfloat16, 2.5e-2)])
def test_lower_precision_stays_near_the_fp64_recurrence(op, decay, dtype, tol) -> None:
    if op == "retention":
        tol = max(tol, 1e-3)  # ops/ssd sums log decays over the whole row in fp32
    call = make_call(op, 2, 200, K=16, V=16, decay=decay, docs=random_docs(2, 200, 6)).to(dtype)
    assert_close(results(call), results(call.to(torch.float64), "reference"), tol)
    o, last = call.run()
    assert o.dtype == dtype and last.dtype == torch.float32


@every_op
@pytest.mark.parametrize("T", [1, 31, 32, 33, 63, 64, 65, 128, 129])
def test_lengths_around_a_chunk(op, T) -> None:
    call = make_call(op, 2, T, decay=1.0)
    assert_close(results(call), results(call.to(torch.float64), "reference"), 1e-10)


@every_op
def test_ambient_autocast_changes_nothing(op) -> None:
    call = make_call(op, 2, 70).to(torch.float32)
    want = results(call)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(call)
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@every_op
def test_other_documents_stay_bit_equal(op) -> None:
    """Changing one document in the middle moves no bit of the others, not even by rounding."""
    if op == "retention":
        pytest.skip("served by ops/ssd, whose running sums go through; tested to 1e-10 above")
    docs = Docs.packed([0, 30, 75, 140])
    call = make_call(op, 1, 140, docs=docs, state=True, decay=0.5).to(torch.float32)
    other = call.to(torch.float32)
    with torch.no_grad():
        for a in other.args[: 5 if "delta" in op or op == "kda" else 4]:
            a[:, 30:75] *= 1.7
    (o, last), (o2, last2) = call.run(), other.run()
    assert not torch.equal(o[:, 30:75], o2[:, 30:75])
    assert torch.equal(o[:, :30], o2[:, :30]) and torch.equal(o[:, 75:], o2[:, 75:])
    assert torch.equal(last, last2)


@every_op
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_padding_is_never_read(op, backend) -> None:
    """NaN under the padding reaches no output, state or gradient; a row of padding keeps its state."""
    if op == "retention" and backend == "reference":
        pytest.skip("the reference of ops/ssd; tested there")
    mask = torch.ones(3, 80)
    mask[0, :33], mask[1, 70:], mask[2] = 0, 0, 0
    docs = Docs.from_mask(mask)
    call = make_call(op, 3, 80, docs=docs)
    want = results(call, backend)
    with torch.no_grad():
        for a in call.args:
            if a.shape[:2] == mask.shape:
                a[~docs.tokens] = torch.nan
    assert_close(results(call, backend), want, 0)
    o, last = call.run(backend)
    assert torch.equal(last[2], call.state[2]) and not o[~docs.tokens].any()


@every_op
@pytest.mark.parametrize("T", [0, 1, 3])
def test_state_is_fresh(op, T) -> None:
    call = make_call(op, 2, T)
    before = call.state.clone()
    _, last = call.run()
    assert last.data_ptr() != call.state.data_ptr() and last.is_contiguous()
    assert torch.equal(call.state, before)
    if T == 0:
        assert torch.equal(last, before)


@every_op
@pytest.mark.parametrize("T", [1, 40, 64, 200])
def test_flops_equal_the_counter(op, T) -> None:
    H, K, V = 2, 8, 6
    # A decay per head is served by ops/ssd, which counts no final state.
    options = {"want_state": False} if op == "retention" else {}
    call = make_call(op, 2, T, H, K, V, state=False, **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call.run()
    one_row = {
        "gla": gla_flops(T, H, K, V),
        "retention": simple_gla_flops(T, H, K, V),
        "rwkv6": gla_flops(T, H, K, V),
        "delta": delta_flops(T, H, K, V),
        "gated_delta": delta_flops(T, H, K, V),
        "kda": delta_flops(T, H, K, V, per_channel=True),
    }
    assert counter.get_total_flops() == 2 * one_row[op]


@every_op
def test_gradcheck(op) -> None:
    call = make_call(op, 1, 5, 1, 2, 2, docs=Docs.packed([0, 3, 5]), decay=0.7)

    def run(*leaves):
        call.args, call.state = list(leaves[:-1]), leaves[-1]
        return call.run()

    assert torch.autograd.gradcheck(run, call.leaves())


@every_op
def test_wrong_shapes_and_backends_are_refused(op) -> None:
    call = make_call(op, 2, 7)
    with pytest.raises(BackendError, match="fla"):
        call.run("fla")
    with pytest.raises(BackendError, match="no backend called 'fast'"):
        call.run("fast")
    call.state = call.state[:, :, :-1]
    with pytest.raises(ValueError, match="state must be"):
        call.run()
