"""RWKV-6: reads before it writes, with a bonus for the token itself."""

from __future__ import annotations

import pytest
import torch

from model.ops.linear import gla, rwkv6

from .linear_cases import assert_close, make_call, results


def test_no_decay_and_bonus_one_is_linear_attention() -> None:
    r, k, v, _, u = make_call("rwkv6", 2, 100, state=False).args
    w = torch.zeros_like(r)
    o, last = rwkv6(r, k, v, w, torch.ones_like(u))
    o2, last2 = gla(r, k, v, w, scale=1.0)
    assert_close([o, last], [o2, last2], 1e-12)


def test_bonus_reaches_only_the_token_itself() -> None:
    call = make_call("rwkv6", 1, 50)
    o, last = call.run()
    u = call.args[4].detach().clone()
    call.args[4] = torch.zeros_like(u)
    o0, last0 = call.run()
    r, k, v = call.args[:3]
    assert_close([o - o0], [(r * u * k).sum(-1, keepdim=True) * v], 1e-12)
    assert torch.equal(last, last0)


def test_the_first_token_reads_the_state_undecayed() -> None:
    call = make_call("rwkv6", 1, 3, decay=50.0)
    o, _ = call.run()
    r, k, v, _, u = call.args
    want = torch.einsum("bhk,bhkv->bhv", r[:, 0], call.state)
    want = want + (r * u * k).sum(-1, keepdim=True)[:, 0] * v[:, 0]
    assert_close([o[:, 0]], [want], 1e-12)


@pytest.mark.parametrize("decay", [0.3, 8.0])
def test_gradient_of_the_decay_in_bf16(decay: float) -> None:
    """Where kernels are weakest: the decay's gradient is a sum of differences."""
    call = make_call("rwkv6", 2, 256, K=32, V=32, decay=decay).to(torch.bfloat16)
    got, want = results(call), results(call.to(torch.float64), "reference")
    off = (got[5] - want[5]).norm() / want[5].norm()
    assert off < 2e-2, f"relative error {off:.1e}"


def test_wrong_bonus_is_refused() -> None:
    r, k, v, w, u = make_call("rwkv6", 1, 4).args
    with pytest.raises(ValueError, match="u \\(2, 5\\)"):
        rwkv6(r, k, v, w, u[:, :3])
