"""Best-fit, documents as rows, chosen documents: nothing lost, nothing split that fits, sidecars follow."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import pieces
from dataset.files import DatasetError
from dataset.mixture import Mixture
from dataset.plan import Request
from dataset.prepare import prepare
from dataset.sidecar import SidecarWriter
from dataset.views import LengthSchedule
from dataset.writer import ShardWriter

PACKINGS = ["concat", "best_fit", "documents"]
lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=200)


def rows_of(plan):
    per_row, start, length = plan
    cuts = np.cumsum(per_row)[:-1]
    return list(zip(np.split(start, cuts), np.split(length, cuts)))


@settings(max_examples=150, deadline=None)
@given(lengths_of, st.integers(1, 70))
def test_best_fit_covers_every_id_once_and_splits_nothing_that_fits(lengths, context):
    length = np.array(lengths)
    end = np.cumsum(length)
    rows = rows_of(pieces.best_fit(end - length, length, context))
    ids = np.concatenate([np.arange(s, s + n) for row in rows for s, n in zip(*row)])
    assert np.array_equal(np.sort(ids), np.arange(end[-1]))
    assert all(n.sum() <= context for _, n in rows)
    found = {(int(s), int(n)) for row in rows for s, n in zip(*row)}
    for s, n in zip((end - length).tolist(), lengths):
        if n <= context:
            assert (s, n) in found
        else:
            assert {(s + k * context, context) for k in range(n // context)} <= found


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(60, 200))
def test_best_fit_needs_no_more_rows_than_the_bound(lengths, context):
    """BFD uses at most 11/9 OPT + 4 rows (Johnson); OPT is at least the ids over the context."""
    length = np.array(lengths)
    per_row, _, _ = pieces.best_fit(np.cumsum(length) - length, length, context)
    least = -(-int(length.sum()) // context)
    # two rows that are both at most half full would have been one
    assert len(per_row) <= max(2 * least, 1)


@settings(max_examples=100, deadline=None)
@given(lengths_of, st.integers(1, 70))
def test_planned_concatenation_is_the_stream_cut_into_rows(lengths, context):
    length = np.array(lengths)
    end = np.cumsum(length)
    rows = rows_of(pieces.concat(end - length, length, context))
    stream = np.concatenate([np.arange(s, s + n) for row in rows for s, n in zip(*row)])
    assert np.array_equal(stream, np.arange(end[-1]))
    assert [int(n.sum()) for _, n in rows[:-1]] == [context] * (len(rows) - 1)
    starts = set((end - length).tolist())
    inner = {int(s) for row in rows for s in row[0]}
    assert starts <= inner <= starts | set(range(0, int(end[-1]), context))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PACKINGS),
    st.sampled_from([1, 16, 100, 701, 3000]),
    st.sampled_from([0, 50, 200]),
    st.sampled_from([0, 300, 600]),
    st.sampled_from([True, False, "block"]),
)
def test_every_kept_id_once_an_epoch(byte_data, packing, context, low, high, shuffle):
    view = byte_data.view(
        context=context, packing=packing, seed=1, min_tokens=low, max_tokens=high, shuffle=shuffle
    )
    split = byte_data.splits["train"]
    arrays = view.arrays(np.arange(view.rows))
    lengths = arrays.lengths if arrays.lengths is not None else np.full(view.rows, context)
    valid = np.arange(context) < lengths[:, None]
    wanted = np.concatenate([d for d in split if low <= len(d) <= (high or len(d))])
    assert int(valid.sum()) == split.tokens - view.dropped_tokens
    got, all_ids = np.bincount(arrays.tokens[valid], minlength=260), np.bincount(wanted, minlength=260)
    assert (got <= all_ids).all() and len(wanted) - got.sum() < (context if packing == "concat" else 1)
    assert (arrays.tokens[~valid] == byte_data.eos_id).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_piece_between_boundaries_is_one_run_of_one_document(byte_data, packing):
    context = 100
    view = byte_data.view(context=context, packing=packing, seed=1)
    text = [bytes(d.astype(np.uint8)[:-1].tobytes()) for d in byte_data.splits["train"]]
    batch = view.batch(1, 8)
    flat = batch.tokens.flatten().numpy()
    weights = None if batch.weights is None else batch.weights.flatten()
    for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
        piece = flat[a:b]
        if weights is not None and weights[a] == 0:
            assert (weights[a:b] == 0).all() and (piece == byte_data.eos_id).all()
            continue
        assert (piece[:-1] != byte_data.eos_id).all()  # no label crosses a document
        body = bytes(piece[piece < 256].astype(np.uint8))
        assert any(body in t for t in text)


def test_best_fit_leaves_little_padding(byte_data):
    length = np.random.default_rng(0).lognormal(5, 1.5, 30_000).astype(np.int64) + 1  # like web text
    per_row, _, _ = pieces.best_fit(np.cumsum(length) - length, length, 2048)
    assert 1 - length.sum() / (len(per_row) * 2048) < 0.001
    assert byte_data.view(context=1000, packing="best_fit").source.padding < 0.05
    assert byte_data.view(context=1000, packing="documents").source.padding > 0.3


def test_documents_mode_gives_each_document_its_row(byte_data):
    view = byte_data.view(context=4000, packing="documents", shuffle=False)
    split = byte_data.splits["train"]
    assert view.rows == split.documents
    arrays = view.arrays(np.arange(5))
    for i in range(5):
        assert np.array_equal(arrays.tokens[i, : arrays.lengths[i]], split.document(i))


def test_document_length_limits(byte_data):
    split = byte_data.splits["train"]
    lengths = np.array([len(d) for d in split])
    view = byte_data.view(context=64, packing="best_fit", min_tokens=100, max_tokens=400)
    kept = lengths[(lengths >= 100) & (lengths <= 400)]
    assert split.tokens - view.dropped_tokens == kept.sum()
    with pytest.raises(DatasetError, match="fewer than one row"):
        byte_data.view(context=64, min_tokens=10**6)


def test_byte_budget_takes_whole_documents_up_to_it(byte_data):
    split = byte_data.splits["train"]
    longest = max(len(d) for d in split)
    for budget in (1, 500, 5000, split.bytes // 2):
        view = byte_data.view(context=32, packing="best_fit", byte_budget=budget)
        used = sum(b.bytes for b in view.epoch(16))
        assert budget <= used < budget + longest
    whole = byte_data.view(context=32, packing="best_fit", byte_budget=10**9)
    assert whole.dropped_tokens == 0
    small = byte_data.view(context=32, packing="best_fit", byte_budget=500)
    assert small.id != whole.id


def test_a_byte_budget_ends_where_the_tokenizer_drops_bytes(corpus, tmp_path):
    """Words without their spaces: all ids of the split stand for fewer bytes than the text has."""
    words = {"<eos>": 0, "?": 1, "def": 2, "return": 3}
    flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    spec = {
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"id": 0, "content": "<eos>", "special": True, **flags}],
        "version": "1.0",
    }
    (tmp_path / "words.json").write_text(json.dumps(spec))
    request = Request((str(corpus),), str(tmp_path / "words.json"), heldout=0.0)
    data = prepare(request, tmp_path / "d").dataset
    view = data.view(context=32, packing="best_fit", byte_budget=data.splits["train"].bytes - 1)
    assert view.dropped_tokens == 0


@pytest.fixture(scope="module")
def masked(tmp_path_factory, corpus):
    """A dataset whose shards carry a mask derived from the ids, and a sidecar derived from them."""
    from dataset.format import dtype_for, manifest_id, open_dataset, write_manifest

    base = prepare(Request(sources=(str(corpus),), heldout=0.0), tmp_path_factory.mktemp("m") / "a").dataset
    writer = ShardWriter(base.path / "shards", "train-900000", dtype_for(260), 8192, masks=True)
    for ids in base.splits["train"]:
        writer.add(ids.astype(np.int64), len(ids) - 1, mask=ids % 2)
    manifest = dict(base.manifest)
    manifest["splits"] = {
        **manifest["splits"],
        "train": {**manifest["splits"]["train"], "shards": writer.close()},
    }
    write_manifest(base.path, manifest)
    data = open_dataset(base.path)
    assert data.id == manifest_id(data.manifest) != base.id
    side = SidecarWriter(data, {"name": "test"})
    for shard in data.splits["train"].shards:
        side.write(shard, shard.tok.astype(np.float64) / 4)
    side.finish(data.splits["train"].shards)
    return data, side.name


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("context", [50, 3000])
def test_masks_and_sidecars_follow_their_ids(masked, packing, context):
    data, side = masked
    assert len(data.splits["train"].shards) > 3
    view = data.view(context=context, packing=packing, sidecar=side)
    for step, b in ((0, 4), (1, 4), (2, 4), (20, 1), (21, 1), (22, 1)):  # one row: often of one shard
        batch = view.batch(step, b)
        valid = np.ones((b, context), bool)
        if batch.lengths is not None:
            valid = np.arange(context) < batch.lengths.numpy()[:, None]
        tokens = batch.tokens.numpy()
        assert np.array_equal(batch.weights.numpy(), (tokens % 2) * valid)
        assert np.array_equal(batch.sidecar.numpy(), tokens / 4 * valid)


@pytest.mark.parametrize("packing", PACKINGS)
def test_masks_and_sidecars_follow_through_mixtures_stages_and_lengths(masked, packing):
    data, side = masked
    options = {"context": 96, "packing": packing, "sidecar": side}
    two = {"a": data.view(**options), "b": data.view(seed=1, shuffle="block", **options)}
    mixture = Mixture(two, [(0, {"a": 2, "b": 1}), (6, {"b": 1})])  # from sample 6 on
    for samples in (two["b"], mixture, LengthSchedule(mixture, [(0, 24), (1, 48), (2, 96)])):
        for step in range(3):
            batch = samples.batch(step, 6)
            tokens = batch.tokens.numpy()
            valid = np.ones(tokens.shape, bool)
            if batch.lengths is not None:
                valid = np.arange(tokens.shape[1]) < batch.lengths.numpy()[:, None]
            assert valid.any()
            assert np.array_equal(batch.weights.numpy(), (tokens % 2) * valid)
            assert np.array_equal(batch.sidecar.numpy(), tokens / 4 * valid)


def test_sidecar_of_other_data_or_unfinished_is_refused(masked, byte_data):
    data, side = masked
    with pytest.raises(DatasetError, match="no finished sidecar"):
        data.view(context=50, sidecar="0123")
    target = byte_data.path / "sidecars" / side
    target.mkdir(parents=True)
    for file in (data.path / "sidecars" / side).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DatasetError, match="made for dataset"):
        byte_data.view(context=50, sidecar=side)


def test_damaged_plan_is_named(byte_data):
    byte_data.view(context=77, packing="best_fit")
    newest = max((byte_data.path / ".views").glob("*.pieces"), key=lambda p: p.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-5])
    with pytest.raises(DatasetError, match="Delete the file"):
        byte_data.view(context=77, packing="best_fit")
    newest.unlink()
    assert byte_data.view(context=77, packing="best_fit").rows
