"""The summary block beside a plain form of it, and what its two modes do.

Shape legend: B batch  T time  S tokens of a segment  J vectors  H heads  G key/value heads  K head width
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.core import detach
from model.ops.rope import rope, rope_tables
from model.registry import make_block

SIZES = {"head_dim": 4, "group": 2, "every": 3, "vectors": 2, "window": 5}


def make(**more):
    torch.manual_seed(0)
    return make_block("summary", 16, **{**SIZES, **more}).double()


def turn(t: Tensor, position: int) -> Tensor:
    """t [n, K] turned to one position."""
    tables = rope_tables(torch.tensor([[position]]), 4, 10_000.0, t.dtype)
    return rope(t[None, None], *tables)[0, 0]


def softmax_read(q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
    if not k:
        return torch.zeros_like(q)
    return (torch.stack(k) @ q / 2).softmax(0) @ torch.stack(v)


def plainly(block, x: Tensor) -> Tensor:
    """One row [T, 16], token by token and head by head, from the docstring."""
    T, H, G = len(x), block.heads, block.kv_heads
    q, k, v = (p(x).unflatten(-1, (-1, 4)) for p in (block.q_proj, block.k_proj, block.v_proj))
    q, k = (torch.stack([turn(t[p], p) for p in range(T)]) for t in (q, k))
    gate, rows = block.g_proj(x).sigmoid(), []
    memory: list[tuple[Tensor, Tensor]] = []  # (keys, values) [G, K], newest last
    for t in range(T):
        if (t + 1) % 3 == 0:
            made = []
            for j in range(2):
                asked, found = turn(block.asks[j], t), []
                for g in range(G):
                    keys, values = list(k[t - 2 : t + 1, g]), list(v[t - 2 : t + 1, g])
                    if block.recompress:
                        keys, values = keys + [m[0][g] for m in memory], values + [m[1][g] for m in memory]
                    found.append(softmax_read(asked[g], keys, values))
                key = torch.stack([found[g] @ block.memory_k[g] for g in range(G)])
                made.append((turn(key, t), torch.stack([found[g] @ block.memory_v[g] for g in range(G)])))
            memory = made if block.recompress else memory + made
        heads = []
        for h in range(H):
            g, near = h // (H // G), range(max(0, t - 4), t + 1)
            local = softmax_read(q[t, h], [k[s, g] for s in near], [v[s, g] for s in near])
            read = softmax_read(q[t, h], [m[0][g] for m in memory], [m[1][g] for m in memory])
            heads.append(local + gate[t, h] * read)
        rows.append(torch.cat(heads))
    return block.o_proj(torch.stack(rows))


@pytest.mark.parametrize("mode", ["accumulate", "recompress"])
def test_equals_the_plain_form_with_gradients(mode):
    block = make(mode=mode)
    x = torch.randn(13, 16, dtype=torch.float64, requires_grad=True)
    got, want = block(x[None]).y[0], plainly(block, x)
    torch.testing.assert_close(got, want)
    w, leaves = torch.randn_like(want), [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * w).sum(), leaves), torch.autograd.grad((want * w).sum(), leaves)
    ):
        torch.testing.assert_close(a, b)


def reach(block, x: Tensor) -> list[int]:
    """Tokens that the last output has a gradient to."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(block(x).y[:, -1].sum(), x)
    return [t for t in range(x.shape[1]) if g[0, t].any()]


def test_bptt_cuts_between_memories_and_detach_between_calls():
    """Memories 0..4 of tokens 0..14; the last output reads memory 4 and the window 11..15."""
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    assert reach(make(mode="recompress"), x) == list(range(16))
    assert reach(make(mode="recompress", bptt=1), x) == list(range(11, 16))
    assert reach(make(mode="recompress", bptt=3), x) == list(range(9, 16))  # cut before segment 3
    block = make(mode="recompress")
    first = x[:, :9].clone().requires_grad_()
    state = block(first, block.init_state(1, x)).state
    y = block(x[:, 9:], detach(state)).y
    assert torch.autograd.grad(y.sum(), first, allow_unused=True)[0] is None
    torch.testing.assert_close(y, block(x).y[:, 9:])


def test_accumulating_grows_and_recompressing_does_not():
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    sizes = {}
    for mode in ("accumulate", "recompress"):
        block = make(mode=mode)
        state = block(x, block.init_state(1, x)).state
        sizes[mode] = state.k.shape[1]
    assert sizes == {"accumulate": 16, "recompress": 1}
    block = make()
    with pytest.raises(OverflowError, match="summaries of 3 segments of 3 tokens and would need 10"):
        block(x, block.init_state(1, x, capacity=9))


@pytest.mark.parametrize(("sizes", "message"), [
    ({"window": 3, "every": 4}, "window=3: must reach over the 4 tokens"), ({"every": 1}, "every=1"),
    ({"mode": "forget"}, "mode='forget'"), ({"bptt": 2}, "bptt=2: segments"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make(**sizes)
