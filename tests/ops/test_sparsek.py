"""SparseK: the operator, its gradient, and the chunked attention beside the token-by-token form.

Shape legend: B batch  T time  H query heads  G key/value heads  K key width  n scores
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.ops.attention import Places, attend
from model.ops.sparsek import Sizes, SparseKState, cpu, sparsek
from model.ops.sparsek.gates import gates
from model.ops.sparsek.reference import projection
from model.registry import make_block

from .layouts import random_docs


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.sampled_from([0.05, 1.0, 30.0]), st.integers(0, 9999))
def test_the_operator_is_the_projection(keep, n, spread, seed):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(3, max(n, keep), generator=g, dtype=torch.float64) * spread
    u[0] = u[0].round()  # ties
    u = u.sort(-1, descending=True).values
    there = torch.arange(u.shape[1]) < torch.tensor([[u.shape[1]], [keep], [max(n - 1, 0)]])
    p = gates(u, there, keep)
    assert not p[~there].any()
    torch.testing.assert_close(p.sum(-1), there.sum(-1).clamp_max(keep).double())
    for row in range(3):
        torch.testing.assert_close(p[row, there[row]], projection(u[row, there[row]], keep))


def test_its_jacobian_is_that_of_the_projection():
    u = torch.tensor([2.0, 0.9, 0.7, 0.4, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    there = torch.ones(6, dtype=torch.bool)
    p = gates(u, there, 2)
    f = ((p > 0) & (p < 1)).double()
    assert 2 <= f.sum() < 6
    want = torch.diag(f) - torch.outer(f, f) / f.sum()
    got = torch.autograd.functional.jacobian(lambda u: gates(u, there, 2), u)
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda u: gates(u, there, 2), u)


def problem(B: int, T: int, H: int, G: int, sizes: Sizes, seed: int) -> tuple[list[Tensor], dict]:
    docs, g = random_docs(B, T, seed), torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, h, 4, generator=g, dtype=torch.float64) for h in (H, G, G))
    u = torch.randn(B, T, G, generator=g, dtype=torch.float64)
    u[0] = (3 * u[0]).round() * 0.37  # equal scores too; no two are 1 apart, where p has a kink
    rest = {"sizes": sizes, "at": Places.of(docs), "carried": docs.first_segment()}
    return [t.requires_grad_() for t in (q, k, v, u)], rest


def run(leaves: list[Tensor], rest: dict, backend: str) -> list[Tensor]:
    _, k, v, u = leaves
    empty = SparseKState.empty(k, v, u, rest["sizes"])
    y, state = sparsek(*leaves, state=empty, backend=backend, **rest)
    outs = [y, *state[:-1]]
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in outs)
    loss = loss + u.sum()  # which nothing reads while all tokens are in the window
    return [*outs, state.seen, *torch.autograd.grad(loss, leaves)]


SIZES = [Sizes(2, 4, 3), Sizes(1, 1, 1), Sizes(3, 7, 2), Sizes(4, 4, 6)]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 40), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from(SIZES),
    st.sampled_from([1, 5, 64]), st.integers(0, 9999),
)  # fmt: skip
def test_chunks_equal_the_reference(B, T, heads, sizes, chunk, seed):
    leaves, rest = problem(B, T, *heads, sizes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK", chunk)
        got = run(leaves, rest, "cpu")
    for a, b in zip(got, run(leaves, rest, "reference")):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_everything_kept_is_full_attention():
    leaves, rest = problem(2, 20, 4, 2, Sizes(20, 20, 3), 3)
    q, k, v, u = leaves
    y, _ = sparsek(q, k, v, u, **rest)
    torch.testing.assert_close(y, attend(q, k, v, at=rest["at"], key_at=rest["at"]))


def test_the_scores_learn_and_a_longer_context_costs_no_memory():
    torch.manual_seed(0)
    ours = make_block("sparsek", 16, head_dim=8, keep=2, slots=4, window=3).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    ours(x).y.square().sum().backward()
    assert ours.score_proj.weight.grad.any() and ours.slope.grad.any()
    sizes = [sum(t.numel() for t in ours(x[:, :n], ours.init_state(1, x)).state) for n in (1, 30)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("sizes", "message"), [
    ({"keep": 200}, "keep=200: at least 1 and at most slots=128"), ({"window": 0}, "window=0"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_block("sparsek", 64, **sizes)
