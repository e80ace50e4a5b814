"""GLA: its two chunk forms, and how one of them is chosen."""

from __future__ import annotations

import pytest
import torch

from model.ops.linear import gla
from model.ops.linear.decay import is_narrow

from .linear_cases import assert_close, make_call, results


@pytest.mark.parametrize("floor", [-0.2, -1e9])
@pytest.mark.parametrize("op", ["gla", "rwkv6"])
def test_both_forms_are_the_recurrence_to_fp32_rounding(op: str, floor: float) -> None:
    """The narrow form (a floor is promised) and the exact one, on the same values."""
    call = make_call(op, 2, 256, K=32, V=32, decay=0.2, floor=floor).to(torch.float32)
    want = call.to(torch.float64)
    got, ref = results(call), results(want, "reference")
    assert_close(got[:2], ref[:2], 5e-7)
    assert_close(got, ref, 2e-6)


def test_the_form_follows_the_decays() -> None:
    g = torch.full((1, 130, 1, 2), -0.9)
    assert is_narrow(g)
    g[0, 70, 0, 1] = -5.0  # 63 * 0.9 + 5 > 60
    assert not is_narrow(g)
    assert is_narrow(g, floor=-0.9), "a promise is taken without a look"
    assert not is_narrow(g, floor=-1.0)
    assert is_narrow(0.1 * g, floor=-2.0), "a low floor promises nothing, and the values are looked at"
    assert is_narrow(g[:, :10], floor=-5.0), "a short call sums less"
    g = torch.full((1, 130, 1, 2), -0.1)
    g[0, 129] = -70.0  # in the ragged last chunk
    assert not is_narrow(g)


@pytest.mark.parametrize("op", ["gla", "retention", "rwkv6", "gated_delta", "kda"])
@pytest.mark.parametrize("pattern", ["all", "spikes", "infinite"])
def test_extreme_decays_are_finite_and_right(op: str, pattern: str) -> None:
    """g = -50 throughout, or between zeros, or -inf (a gate that is shut): values and gradients."""
    if op == "retention" and pattern == "infinite":
        pytest.skip("ops/ssd takes finite log decays")
    call = make_call(op, 2, 130, decay=0.0).to(torch.float32)
    g = next(a for a in call.args[3:][::-1] if a.dim() >= 3 and not a.any())
    with torch.no_grad():
        where = torch.rand(g.shape) < (1.0 if pattern == "all" else 0.2)
        g[where] = -torch.inf if pattern == "infinite" else -50.0
    got = results(call)
    assert all(torch.isfinite(x).all() for x in got)
    if pattern != "infinite":  # the recurrence itself gives 0 * inf there
        assert_close(got, results(call.to(torch.float64), "reference"), 2e-5, floor=1.0)


def test_a_gate_per_head_is_the_same_gate_in_every_channel() -> None:
    call = make_call("retention", 2, 90)
    q, k, v, g = call.args
    wide = g[..., None].expand_as(q)
    o, last = call.run()
    o2, last2 = gla(q, k, v, wide, state=call.state)
    assert_close([o, last], [o2, last2], 1e-12)


def test_without_decay_it_is_linear_attention() -> None:
    q, k, v, g = make_call("gla", 1, 100, decay=0.0, state=False).args
    o, last = gla(q, k, v, g, scale=1.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    assert_close([o], [torch.einsum("bhts,bshv->bthv", scores, v)], 1e-12)
    assert_close([last], [torch.einsum("bthk,bthv->bhkv", k, v)], 1e-12)


def test_named_shapes_in_errors() -> None:
    q, k, v, g = make_call("gla", 2, 5).args
    with pytest.raises(ValueError, match=r"gla: g must be \(2, 5, 2, 5\) or \(2, 5, 2\).*got \(2, 5, 2, 4\)"):
        gla(q, k, v, g[..., :4])
