"""Attention over a window and pairs: against a loop over queries, and plain where nothing is merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ops.attention import Places, attend
from model.ops.pairs import attend_pairs
from model.registry import make_block

H, G, K = 4, 2, 6


def loop(q, k, v, mk, mv, window, r, M):
    """One query at a time, in the words of the docstring; q [T, H, K], k, v [T, G, K], mk, mv [P, G, K]."""
    out = torch.zeros_like(q)
    for p in range(q.shape[0]):
        P = max(0, (p - window + 1) // 2)
        n = min(int(r * P + M * (1 - r) / 2 + 1e-6), P)
        paid = torch.zeros(P, dtype=q.dtype)
        for h in range(H):
            if P:
                paid += (mk[:P, h // (H // G)] @ q[p, h] * K**-0.5).softmax(0)
        opened = set(paid.argsort(descending=True)[:n].tolist())
        for h in range(H):
            g = h // (H // G)
            keys, values = [], []
            for i in range(P):
                two = i in opened
                keys += [k[2 * i, g], k[2 * i + 1, g]] if two else [mk[i, g]]
                values += [v[2 * i, g], v[2 * i + 1, g]] if two else [mv[i, g]]
            keys += list(k[2 * P : p + 1, g])
            values += list(v[2 * P : p + 1, g])
            weights = (torch.stack(keys) @ q[p, h] * K**-0.5).softmax(0)
            out[p, h] = weights @ torch.stack(values)
    return out


def given_places(T, B):
    at = Places(torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.int64))
    P = T // 2
    return at, Places((2 * torch.arange(P) + 1).expand(B, P), torch.zeros(B, P, dtype=torch.int64))


@given(
    st.integers(1, 15), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 6),
    st.integers(0, 99),
)  # fmt: skip
def test_the_loop(T, window, r, M, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v, mk, mv = (
        torch.randn(2, n, heads, K, dtype=torch.float64, generator=g)
        for n, heads in ((T, H), (T, G), (T, G), (T // 2, G), (T // 2, G))
    )
    at, ends = given_places(T, 2)
    got = attend_pairs(q, k, v, at, at, mk, mv, ends, window=window, r=r, M=M)
    for b in range(2):
        want = loop(q[b], k[b], v[b], mk[b], mv[b], window, r, M)
        assert torch.allclose(got[b], want, atol=1e-12), (T, window, r, M)
    if r == 1.0 or T - window < 2 or T <= M:
        assert torch.allclose(got, attend(q, k, v, backend="reference"), atol=1e-12)


@pytest.mark.parametrize("how", [{"r": 1.0, "window": 2}, {"window": 40}, {"r": 0.2, "window": 2, "M": 40}])
def test_the_block_is_attention_where_nothing_is_merged(how):
    ours = make_block("pair_attn", 32, head_dim=8, group=2, **how)
    plain = make_block("attention", 32, head_dim=8, group=2)
    ours.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 21, 32)
    assert torch.allclose(ours(x).y, plain(x).y, atol=1e-5)
    merged = make_block("pair_attn", 32, head_dim=8, group=2, window=2, r=0.0)
    merged.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(merged(x).y, plain(x).y, atol=1e-3)


def test_bad_sizes_are_named():
    for wrong, word in (({"r": 1.2}, "r=1.2"), ({"window": 0}, "window=0"), ({"group": 3}, "group=3")):
        with pytest.raises(ValueError, match=word):
            make_block("pair_attn", 64, **{"head_dim": 8, **wrong})
