"""Native sparse attention: both fast forms equal the query-by-query form, in outputs and gradients.

Shape legend: B batch  T time  C pooled keys  H query heads  G key/value heads  K key width
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.blocks._windows import make_windows, take
from model.ops.attention import Places, attend
from model.ops.nsa import Grid, Pooled, cpu, nsa
from model.registry import make_block

from .layouts import random_docs


def problem(B: int, T: int, H: int, G: int, grid: Grid, seed: int) -> tuple[list[Tensor], dict]:
    """Leaves (q, k, v, pooled k, pooled v) of random documents, and the rest of the arguments."""
    docs = random_docs(B, T, seed)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, h, 4, generator=g, dtype=torch.float64) for h in (H, G, G))
    windows = make_windows(docs, None, grid.pool, grid.stride, B, T, q.device)
    empty = torch.zeros(B, grid.pool - 1, G, 4)
    pooled = [take(torch.cat([empty.to(t), t], 1), windows.members).mean(2) for t in (k, v)]
    at = Places.of(docs)
    rest = {
        "grid": grid, "at": at, "key_at": at, "base": torch.arange(T) - docs.positions,
        "windows": windows,
    }  # fmt: skip
    return [t.detach().requires_grad_() for t in (q, k, v, *pooled)], rest


def run(leaves: list[Tensor], rest: dict, backend: str) -> list[Tensor]:
    q, k, v, pk, pv = leaves
    rest = dict(rest)
    windows = rest.pop("windows")
    out = nsa(q, k, v, Pooled(pk, pv, windows.at, windows.number), backend=backend, **rest)
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in out)
    return [*out, *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)]


GRIDS = [Grid(4, 2, 4, 3), Grid(2, 2, 6, 4), Grid(6, 2, 2, 5), Grid(3, 3, 3, 3)]


@pytest.mark.parametrize("form", ["dense", "gathered"])
@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 40), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from(GRIDS),
    st.integers(0, 9999),
)  # fmt: skip
def test_forms_equal_the_reference(form, B, T, heads, grid, seed):
    leaves, rest = problem(B, T, *heads, grid, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "GATHER", 0 if form == "gathered" else 1 << 30)
        patch.setattr(cpu, "SLICE", 7)
        patch.setattr(cpu, "ROOM", 500)
        got = run(leaves, rest, "cpu")
    for a, b in zip(got, run(leaves, rest, "reference")):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_all_blocks_selected_is_full_attention_and_the_window_is_swa():
    """The reductions: gates (0, 1, 0) with every block read, and gates (0, 0, 1)."""
    torch.manual_seed(0)
    sizes = {"pool": 4, "stride": 2, "block": 4, "count": 8}
    ours = make_block("compressed_attn", 32, head_dim=8, group=2, window=5, **sizes).double()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    weights = {n: p for n, p in ours.state_dict().items() if n[0] in "qkvo"}
    for name, gates, params in (("attention", (0, 1, 0), {}), ("swa", (0, 0, 1), {"window": 5})):
        peer = make_block(name, 32, head_dim=8, group=2, **params).double()
        peer.load_state_dict(weights, strict=True)
        ours.g_proj.register_forward_hook(
            lambda _, i, o, gates=gates: torch.tensor(gates).to(o).sub(0.5).mul(1e4).repeat(4).expand_as(o)
        )
        torch.testing.assert_close(ours(x).y, peer(x).y)


def test_pooled_keys_of_one_token_are_full_attention():
    """pool = stride = 1: the pooled branch is attention itself."""
    leaves, rest = problem(2, 20, 4, 2, Grid(1, 1, 2, 3), 3)
    q, k, v = leaves[:3]
    windows = rest.pop("windows")
    near, _ = nsa(q, k, v, Pooled(*leaves[3:], windows.at, windows.number), **rest)
    torch.testing.assert_close(near, attend(q, k, v, at=rest["at"], key_at=rest["key_at"]))


@pytest.mark.parametrize(("sizes", "message"), [
    ({"pool": 30}, "pool=30 must be a multiple of stride=16"), ({"count": 2}, "at least 3"),
    ({"block": 40}, "block=40 must be a multiple"), ({"window": 0}, "window=0"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_block("compressed_attn", 64, **sizes)
