"""Attention: every fast form against the dense softmax, values and gradients; caches against whole rows."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.core import Docs, reorder
from model.ops.attention import Places, attend
from model.ops.attention.cache import empty_cache, extend
from model.ops.attention.cpu import attend_cpu, attention_flops, block_size
from model.ops.attention.flash import attend_flash
from model.ops.attention.flex import _torch_flex, attend_flex
from model.ops.attention.reference import attend_reference
from model.ops.select import BackendError

CASES = settings(max_examples=40, deadline=None)


def qkv(
    B: int, T: int, H: int, G: int, K: int, S: int | None = None, dtype: torch.dtype = torch.float64
) -> list:
    gen = torch.Generator().manual_seed(1000 * B + 10 * T + H)
    shapes = (B, T, H, K), (B, S or T, G, K), (B, S or T, G, K)
    return [torch.randn(s, generator=gen, dtype=dtype).requires_grad_() for s in shapes]


def same(fast: Tensor, slow: Tensor, inputs: list, tol: float = 1e-9) -> None:
    """Equal values and equal gradients for a random direction."""
    torch.testing.assert_close(fast, slow, atol=tol, rtol=tol)
    direction = torch.randn_like(slow)
    a = torch.autograd.grad((fast * direction).sum(), inputs)
    b = torch.autograd.grad((slow * direction).sum(), inputs)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=10 * tol, rtol=10 * tol)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, Docs | None]:
    """B, T and documents: whole rows, packed, or padded on either side."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["whole", "packed", "padded"]))
    if kind == "whole":
        return B, T, None
    if kind == "packed":
        cuts = draw(st.lists(st.integers(0, B * T), max_size=6))
        return B, T, Docs.packed([0, *sorted(cuts), B * T], rows=B)
    mask = torch.zeros(B, T)
    for row in mask:
        start = draw(st.integers(0, T))
        row[start : draw(st.integers(start, T))] = 1
    return B, T, Docs.from_mask(mask)


@CASES
@given(
    layouts(),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.sampled_from([None, 1, 2, 5, 13, 64]),
    st.sampled_from([1, 4, 7, None]),
    st.booleans(),
    st.booleans(),
)
def test_cpu_form_is_the_dense_softmax(layout, heads, window, block, alibi, sunk):
    B, T, docs = layout
    H, G = heads
    inputs = qkv(B, T, H, G, 8)
    more = {}
    if alibi:
        more["slopes"] = torch.rand(H, dtype=torch.float64)
    if sunk:
        more["sinks"] = torch.randn(H, dtype=torch.float64, requires_grad=True)
    fast = attend_cpu(*inputs, docs=docs, window=window, block=block, **more)
    slow = attend_reference(*inputs, docs=docs, window=window, **more)
    same(fast, slow, [*inputs, more["sinks"]] if sunk else inputs)
    if docs is not None:
        assert bool((fast[~docs.tokens] == 0).all()), "padding gives 0"


@CASES
@given(
    st.integers(0, 20), st.integers(1, 30), st.sampled_from([None, 1, 4, 9]), st.sampled_from([2, 5, None])
)
def test_keys_of_the_past_stand_in_front(past, T, window, block):
    inputs = qkv(2, T, 4, 2, 8, S=past + T)
    fast = attend_cpu(*inputs, window=window, block=block)
    same(fast, attend_reference(*inputs, window=window), inputs)
    whole_q = torch.cat([torch.zeros(2, past, 4, 8, dtype=torch.float64), inputs[0]], dim=1)
    whole = attend_reference(whole_q, *inputs[1:], window=window)[:, past:]
    torch.testing.assert_close(fast, whole)


@CASES
@given(layouts(), st.sampled_from([(2, 2), (4, 1)]), st.sampled_from([None, 1, 3, 8]), st.data())
def test_a_cache_is_the_whole_row(layout, heads, window, data):
    """Split anywhere, inside documents too: same outputs, same final cache, same gradients."""
    B, T, docs = layout
    H, G = heads
    q, k, v = qkv(B, T, H, G, 4)
    cut = data.draw(st.integers(0, T))
    if docs is not None and 0 < cut < T:  # a state always belongs to the document that goes on
        assume(bool((docs.segments[:, cut - 1] == docs.segments[:, cut])[docs.tokens[:, cut]].all()))
    capacity = data.draw(st.sampled_from([None, T + 2])) if window is None else None
    whole, final = _through(q, k, v, [docs], [(0, T)], window, G, capacity)
    halves = None if docs is None else [_slice(docs, 0, cut), _slice(docs, cut, T)]
    parts, state = _through(q, k, v, halves or [None, None], [(0, cut), (cut, T)], window, G, capacity)
    same(parts, attend_reference(q, k, v, docs=docs, window=window), [q, k, v])
    torch.testing.assert_close(whole, parts)
    for a, b in zip(final, state):
        torch.testing.assert_close(a, b)


def _slice(docs: Docs, a: int, b: int) -> Docs:
    """Columns a..b; positions count from the cut, as the contract has it."""
    segments, positions = docs.segments[:, a:b], docs.positions[:, a:b]
    if b > a:
        first = Docs.from_segments(segments, positions).first_segment()[:, None]
        start = torch.where(segments == first, positions, 10**6).amin(1, keepdim=True)
        positions = torch.where(segments == first, positions - start, positions)
    return Docs.from_segments(segments, positions)


def _through(q, k, v, docs, spans, window, G, capacity):
    state = empty_cache(q.shape[0], q, heads=G, widths=(4, 4), window=window, capacity=capacity)
    out = []
    for d, (a, b) in zip(docs, spans):
        view, state = extend(state, k[:, a:b], v[:, a:b], d)
        out.append(attend(q[:, a:b], **view._asdict(), window=window))
    return torch.cat(out, dim=1), state


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_prefill_then_decode(window, side):
    """Prompts of different lengths, padded; then whole rows, one token at a time."""
    lengths, steps = [3, 9, 1], 12
    rows = [qkv(1, n + steps, 2, 1, 4) for n in lengths]
    T = max(lengths)
    mask = torch.zeros(3, T)
    batch = [torch.zeros(3, T, x.shape[2], 4, dtype=torch.float64) for x in rows[0]]
    for r, n in enumerate(lengths):
        place = slice(T - n, T) if side == "left" else slice(0, n)
        mask[r, place] = 1
        for into, x in zip(batch, rows[r]):
            into[r, place] = x[0, :n]
    state = empty_cache(3, batch[0], heads=1, widths=(4, 4), window=window)
    view, state = extend(state, *batch[1:], Docs.from_mask(mask))
    got = [attend(batch[0], **view._asdict(), window=window)]
    for s in range(steps):
        step = [torch.cat([x[i][:, n + s : n + s + 1] for x, n in zip(rows, lengths)]) for i in range(3)]
        view, state = extend(state, *step[1:])
        got.append(attend(step[0], **view._asdict(), window=window))
    for r in range(3):
        whole = attend_reference(*rows[r], window=window)[0]
        mine = torch.cat([got[0][r][mask[r].bool()], *(g[r] for g in got[1:])])
        torch.testing.assert_close(mine, whole)
    assert state.seen.tolist() == [n + steps for n in lengths]


@torch.no_grad()
def test_growing_cache_doubles_in_place_and_reorders():
    q, k, v = qkv(2, 40, 2, 1, 4)
    state = empty_cache(2, q, heads=1, widths=(4, 4))
    sizes, buffers = [], set()
    for t in range(40):
        view, state = extend(state, k[:, t : t + 1], v[:, t : t + 1])
        y = attend(q[:, t : t + 1], **view._asdict())
        sizes.append(state.k.shape[1])
        buffers.add(state.k.data_ptr())
    assert sorted(set(sizes)) == [16, 32, 64] and len(buffers) <= 3
    torch.testing.assert_close(y, attend_reference(q, k, v)[:, -1:])
    swapped = reorder(state, torch.tensor([1, 1]))
    view, _ = extend(swapped, k[1:, :1].expand(2, 1, 1, 4), v[1:, :1].expand(2, 1, 1, 4))
    y = attend(q[1:, :1].expand(2, 1, 2, 4), **view._asdict())
    torch.testing.assert_close(y[0], y[1])


@pytest.mark.parametrize("grad", [True, False])
def test_fixed_cache_overflows_with_a_word(grad):
    q, k, v = qkv(2, 9, 2, 1, 4)
    with torch.set_grad_enabled(grad):
        state = empty_cache(2, q, heads=1, widths=(4, 4), capacity=8)
        _, state = extend(state, k[:, :8], v[:, :8])
        with pytest.raises(OverflowError, match=r"holds 8 tokens and would need 9.*capacity"):
            extend(state, k[:, 8:], v[:, 8:])


def test_document_cannot_read_another():
    """A change in one document leaves the others bit-equal."""
    q, k, v = qkv(1, 30, 2, 1, 8)
    docs = Docs.packed([0, 11, 12, 30])
    before = attend(q, k, v, docs=docs, window=5)
    with torch.no_grad():
        k[:, 11:12] += 100
        v[:, 11:12] += 100
    after = attend(q, k, v, docs=docs, window=5)
    assert torch.equal(before[:, :11], after[:, :11]) and torch.equal(before[:, 12:], after[:, 12:])
    assert not torch.equal(before[:, 11], after[:, 11])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_key_of_limited_lifetime_is_read_below_its_distance(backend):
    B, T = 2, 9
    q, k, v = qkv(B, T, 4, 2, 8)
    lifetime = torch.randint(1, 6, (B, T), generator=torch.Generator().manual_seed(0))
    at = Places.of(Docs.whole(B, T))
    y = attend(q, k, v, at=at, key_at=at, lifetime=lifetime, backend=backend)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < lifetime[:, None])
    logits = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    weight = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    same(y, torch.einsum("bhts,bshv->bthv", weight, v.repeat_interleave(2, 2)), [q, k, v])
    plain = attend(q, k, v, lifetime=lifetime, backend=backend)
    torch.testing.assert_close(plain, y)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 100])
def test_lower_precisions(dtype, tol, window):
    q, k, v = qkv(2, 300, 4, 2, 32)
    exact = attend_reference(q, k, v, window=window)
    got = attend(q.to(dtype), k.to(dtype), v.to(dtype), window=window)
    assert got.dtype == dtype
    assert float(((got.double() - exact).norm() / exact.norm()).detach()) < tol


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("past", [0, 2])
def test_gradcheck(window, past):
    inputs = qkv(1, 6, 2, 1, 4, S=6 + past)
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, s):
        return attend_cpu(q, k, v, sinks=s, window=window, block=2)

    assert torch.autograd.gradcheck(call, (*inputs, sinks))


@pytest.mark.parametrize(
    "T, window", [(0, None), (0, 4), (1, 1), (7, None), (200, 48), (1000, 300), (1000, 256), (300, 400)]
)
@pytest.mark.parametrize(
    "more", [{}, {"sinks": True}, {"slopes": True}, {"sinks": True, "slopes": True}], ids=str
)
def test_flops_are_what_the_counter_counts(T, window, more):
    q, k, v = qkv(1, T, 4, 2, 8, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, window=window, **{name: torch.ones(4) for name in more})
    assert counter.get_total_flops() == attention_flops(T, 4, 8, window, **dict.fromkeys(more, True))


def test_window_is_linear_in_time():
    assert attention_flops(8192, 1, 8, 512) == 4 * attention_flops(2048, 1, 8, 512)
    assert block_size(256) == 256 and block_size(512) == 256


def test_places_that_do_not_fit_are_refused():
    q, k, v = qkv(1, 4, 2, 1, 4)
    docs = Docs.packed([0, 4])
    with pytest.raises(ValueError, match="fewer keys than queries"):
        attend(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="docs"):
        attend(q, k, v, docs=docs, at=Places.of(docs), key_at=Places.of(docs))
    with pytest.raises(ValueError, match="share"):
        attend(qkv(1, 4, 3, 2, 4)[0], *qkv(1, 4, 3, 2, 4)[1:])
    with pytest.raises(BackendError, match="no backend called 'cuda'"):
        attend(q, k, v, backend="cuda")


@pytest.mark.parametrize("window, alibi", [(None, False), (6, True)])
def test_flex_masks_are_the_law(window, alibi):
    """Uncompiled, forward only: that is what runs without a GPU."""
    docs = Docs.from_segments(
        torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3, -1, -1, -1, -1, -1]]),
        torch.tensor([[0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0]]),
    )
    q, k, v = (x.detach() for x in qkv(2, 12, 4, 2, 16, dtype=torch.float32))
    slopes = torch.rand(4) if alibi else None
    got = attend_flex(q, k, v, docs=docs, window=window, slopes=slopes)
    want = attend_reference(q, k, v, docs=docs, window=window, slopes=slopes)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_flex_compiles_its_masks_too(monkeypatch):
    """Uncompiled, making one takes [B, T, S] numbers."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__name__) or f)
    _torch_flex.__wrapped__(True)
    assert compiled == ["create_block_mask", "flex_attention"]


@CASES
@given(layouts(), st.sampled_from([(2, 2), (4, 1)]), st.sampled_from([None, 1, 6]), st.booleans())
@torch.no_grad()
def test_flash_attn_is_called_as_documented(layout, heads, window, alibi):
    """A stand-in with the signature and semantics of flash-attn 2 in the place of the package."""
    B, T, docs = layout
    q, k, v = qkv(B, T, *heads, 16, dtype=torch.float32)
    slopes = torch.rand(heads[0]) if alibi else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", FlashStandIn("flash_attn"))
        got = attend_flash(q, k, v, docs=docs, window=window, slopes=slopes)
    want = attend_reference(q, k, v, docs=docs, window=window, slopes=slopes)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class FlashStandIn(ModuleType):
    """flash-attn 2: [total, heads, width] with cu_seqlens, window_size = (left, right), -1 is no bound."""

    @staticmethod
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None
    ):
        T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)
        left, right = window_size
        hidden = (j > i) if causal else torch.zeros(T, S, dtype=torch.bool)
        hidden |= (j < i - left) if left >= 0 else False
        hidden |= (j > i + right) if right >= 0 else False
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        logits = torch.einsum("bthk,bshk->bhts", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32
            logits = logits - alibi_slopes[:, None, None] * (i - j).abs()
        return torch.einsum("bhts,bshv->bthv", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)

    @classmethod
    def flash_attn_varlen_func(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, **rest
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q
        parts = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)))
        return torch.cat([cls.flash_attn_func(*p, dropout_p, **rest) for p in parts], dim=1)[0]


def test_gpu_backends_refuse_with_the_reason():
    q, k, v = qkv(1, 4, 2, 1, 16)
    for name in ("flash_attn", "flex"):
        with pytest.raises(BackendError, match=f"{name}: needs CUDA tensors, got cpu"):
            attend(q, k, v, backend=name)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", ["flash_attn", "flex", "cpu"])
def test_gpu_backends_equal_the_reference(name, window):
    docs = Docs.packed([0, 300, 301, 700, 1024], rows=2)
    exact = qkv(2, 512, 4, 2, 64, dtype=torch.float32)
    inputs = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    got = attend(*inputs, docs=docs.to("cuda"), window=window, backend=name)
    want = attend_reference(*exact, docs=docs, window=window)
    direction = torch.randn_like(want)
    grads = torch.autograd.grad((got * direction.cuda()).sum(), inputs)
    for a, b in zip((got, *grads), (want, *torch.autograd.grad((want * direction).sum(), exact))):
        assert float(((a.cpu().float() - b).norm() / b.norm()).detach()) < 2e-2
