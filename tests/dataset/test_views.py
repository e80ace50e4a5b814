"""Rows, boundaries and batches of the concat view."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.files import DatasetError
from dataset.loader import Loader
from dataset.plan import Request
from dataset.prepare import prepare


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, byte_data):
    """The dataset of bytes in one shard."""
    out = tmp_path_factory.mktemp("whole") / "bytes"
    data = prepare(Request(sources=(str(corpus),), tokenizer="bytes", heldout=0.1), out).dataset
    assert len(data.splits["train"].shards) == 1 < len(byte_data.splits["train"].shards)
    return data


def stream(split) -> np.ndarray:
    return np.concatenate(list(split)).astype(np.int64)


@pytest.mark.parametrize("context", [1, 7, 64, 1000, 9000])
def test_every_kept_token_once_an_epoch(byte_data, context):
    view = byte_data.view(context=context, seed=3)
    split = byte_data.splits["train"]
    wanted = stream(split)[: view.rows * context].reshape(-1, context)
    got = view.arrays(np.arange(view.rows)).tokens
    order = view.locate(np.arange(view.rows))
    assert np.array_equal(np.sort(order), np.arange(view.rows))
    assert np.array_equal(got, wanted[order])
    assert view.dropped_tokens == split.tokens - view.rows * context < context


@pytest.mark.parametrize("context", [7, 64, 1000, 9000])
def test_boundaries_are_document_or_row_starts(byte_data, context):
    view = byte_data.view(context=context, shuffle=False)
    starts = set(np.cumsum([len(d) for d in byte_data.splits["train"]]).tolist()) | {0}
    b = min(view.rows, 6)
    for first in range(0, view.rows - b + 1, b):
        cu = view.arrays(np.arange(first, first + b)).cu_seqlens
        assert cu.dtype == np.int32 and cu[0] == 0 and cu[-1] == b * context and (np.diff(cu) > 0).all()
        wanted = {t - first * context for t in starts if first * context <= t < (first + b) * context}
        wanted |= {i * context for i in range(b + 1)}
        assert set(cu.tolist()) == wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data(), context=st.sampled_from([1, 7, 64, 1000]))
def test_one_shard_and_many_give_the_same_rows(byte_data, whole, data, context):
    """Rows of one shard are gathered at once, others by segments: ids, widths and boundaries are the same."""
    near, far = (d.view(context=context, shuffle=False).source for d in (whole, byte_data))
    rows = np.array(data.draw(st.lists(st.integers(0, near.rows - 1), max_size=6)), np.int64)
    for dtype in (np.int64, np.uint16):
        a, b = near.read(rows, dtype), far.read(rows, dtype)
        assert a.tokens.dtype == b.tokens.dtype == dtype
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.tokens, near.read_tokens(rows, dtype))
        assert a.cu_seqlens.dtype == b.cu_seqlens.dtype and np.array_equal(a.cu_seqlens, b.cu_seqlens)
        assert np.array_equal(b.tokens, far.read_tokens(rows, dtype))


def test_epochs_differ_and_repeat(byte_data):
    view = byte_data.view(context=64, seed=1)
    n = view.rows
    first, second = view.locate(np.arange(n)), view.locate(np.arange(n, 2 * n))
    assert not np.array_equal(first, second)
    across = view.locate(np.arange(n - 3, n + 3))
    assert np.array_equal(across, np.concatenate([first[-3:], second[:3]]))
    assert not np.array_equal(first, byte_data.view(context=64, seed=2).locate(np.arange(n)))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_global_batches_are_the_same_at_any_world_size_and_resume(byte_data, prefetch):
    """Stop and resume at every pair of world sizes that divide 96: all batches identical."""
    view = byte_data.view(context=64, seed=5)
    worlds = [1, 2, 3, 4, 6, 8, 12]
    wanted = [view.batch(step, 96).tokens for step in range(4)]

    def run(world, state, steps):
        loaders = [Loader(view, 96, rank=r, world=world, ahead=prefetch) for r in range(world)]
        for loader in loaders:
            if state is not None:
                loader.load_state(state)
        batches = [torch.cat([next(loader).tokens for loader in loaders]) for _ in range(steps)]
        for loader in loaders:
            loader.close()
        return batches, loaders[-1].state

    pairs = [(a, b) for a in worlds for b in worlds]
    assert len(pairs) >= 40
    for a, b in pairs:
        before, state = run(a, None, 2)
        after, _ = run(b, state, 2)
        assert all(torch.equal(x, y) for x, y in zip(before + after, wanted, strict=True))


def test_state_of_another_view_is_refused(byte_data):
    loader = Loader(byte_data.view(context=64), 4)
    for other in (byte_data.view(context=32), byte_data.view(context=64, seed=1)):
        with pytest.raises(DatasetError, match="view"):
            Loader(other, 4).load_state(loader.state)
    with pytest.raises(DatasetError, match="global_batch"):
        Loader(byte_data.view(context=64), 8).load_state(loader.state)


def test_heldout_in_order_counts_bytes(byte_data):
    view = byte_data.view(context=50, split="heldout", shuffle=False)
    split = byte_data.splits["heldout"]
    batches = list(view.epoch(7))
    got = torch.cat([b.tokens for b in batches]).flatten().numpy()
    assert np.array_equal(got, stream(split)[: len(got)])
    tail = byte_data.tokenizer.decode_bytes(stream(split)[len(got) :])
    assert sum(b.bytes for b in batches) + len(tail) == split.bytes
    ranks = [torch.cat([b.tokens for b in view.epoch(3, rank=r, world=2)]) for r in range(2)]
    assert sum(len(r) for r in ranks) == view.rows


def test_positions_restart_at_every_boundary(byte_data):
    batch = byte_data.view(context=64).batch(0, 4)
    flat = batch.positions.flatten()
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
        assert flat[start:stop].tolist() == list(range(stop - start))
    assert batch.max_seqlen == int(flat.max()) + 1


def test_reader_errors_reach_the_caller(byte_data, monkeypatch):
    view = byte_data.view(context=64)
    monkeypatch.setattr(view, "arrays", lambda *a: (_ for _ in ()).throw(OSError("disk gone")))
    loader = Loader(view, 4)
    with pytest.raises(OSError, match="disk gone"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 10**9}, "fewer than one row"),
        ({"context": 0}, "at least 1"),
        ({"context": 8.0}, "whole number"),
        ({"context": 8, "packing": "tight"}, "allowed are"),
        ({"context": 8, "split": "test"}, "no split"),
    ],
)
def test_bad_views_say_what_is_allowed(byte_data, options, message):
    with pytest.raises(DatasetError, match=message):
        byte_data.view(**options)
