"""Mixtures, curricula and length schedules: exact shares, exact continuation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from dataset.files import DatasetError
from dataset.mixture import Mixture, integer_weights
from dataset.order import BlockPermutation, chairman
from dataset.sidecar import SidecarWriter
from dataset.views import LengthSchedule


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any))
def test_every_source_stays_within_one_of_its_share(weights):
    table = np.concatenate([chairman(weights)] * 2)  # periods join without a seam
    w = np.array(weights)
    for i in range(len(weights)):
        drawn = np.cumsum(table == i)
        share = np.arange(1, len(table) + 1) * w[i] / w.sum()
        assert np.abs(drawn - share).max() < 1
    assert np.array_equal(np.bincount(table[: w.sum()], minlength=len(w)), w)


@pytest.mark.parametrize(
    ("given_weights", "whole"),
    [([0.5, 0.25, 0.25], [2, 1, 1]), ([3, 1], [3, 1]), ([60, 40], [3, 2]), ([0.7, 0.3, 0], [7, 3, 0])],
)
def test_weights_become_small_integers(given_weights, whole):
    assert integer_weights(given_weights) == whole


def test_odd_weights_are_resolved_to_a_ten_thousandth():
    whole = integer_weights([123456789, 987654321, 1])
    assert sum(whole) <= 10_001 and min(whole) > 0
    assert abs(whole[0] / sum(whole) - 123456789 / 1111111111) < 1e-4


def names_of(mixture, samples):
    return [mixture.names[i] for i in mixture.locate(np.arange(samples))[0]]


@pytest.fixture
def two(byte_data):
    return {
        "a": byte_data.view(context=32, seed=1),
        "b": byte_data.view(context=32, seed=2, packing="best_fit"),
    }


def test_rows_come_from_their_sources_in_order(two):
    mixture = Mixture(two, [(0, {"a": 3, "b": 2})])
    seen = {"a": 0, "b": 0}
    arrays = mixture.arrays(np.arange(50))
    for k, name in enumerate(names_of(mixture, 50)):
        own = two[name].arrays(np.array([seen[name]]))
        assert np.array_equal(arrays.tokens[k], own.tokens[0])
        inside = (
            arrays.cu_seqlens[(arrays.cu_seqlens >= k * 32) & (arrays.cu_seqlens <= (k + 1) * 32)] - k * 32
        )
        assert np.array_equal(inside, own.cu_seqlens)
        length = 32 if own.lengths is None else own.lengths[0]
        assert arrays.lengths is None or arrays.lengths[k] == length
        seen[name] += 1


def test_sources_keep_epochs_of_their_own(two):
    mixture = Mixture(two, [(0, {"a": 1, "b": 1})])
    n = 4 * two["a"].rows
    source, number = mixture.locate(np.arange(n))
    for i, view in enumerate(two.values()):
        mine = number[source == i]
        assert np.array_equal(mine, np.arange(len(mine)))  # each source: 0, 1, 2, ... and so whole epochs
        assert mixture.epochs(n)[mixture.names[i]] == len(mine) / view.rows
    assert mixture.epochs(n)["a"] == 2


def test_curriculum_switches_and_goes_on(two):
    mixture = Mixture(two, [(0, {"a": 1}), (101, {"a": 1, "b": 3}), (301, {"b": 1})])
    source, number = mixture.locate(np.arange(400))
    assert (source[:101] == 0).all() and (source[301:] == 1).all()
    assert abs((source[101:301] == 0).sum() - 50) <= 1
    for i in (0, 1):
        assert np.array_equal(number[source == i], np.arange((source == i).sum()))


def test_mixture_is_the_same_at_any_world_size(two):
    mixture = Mixture(two, [(0, {"a": 2, "b": 1}), (60, {"b": 1})])
    for step in range(3):
        whole = mixture.batch(step, 24).tokens
        for world in (2, 3, 8):
            parts = [mixture.batch(step, 24, r, world).tokens for r in range(world)]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0, {"c": 1})], "unknown source 'c'"),
        ([(1, {"a": 1})], "start at 0"),
        ([(0, {"a": 1}), (0, {"b": 1})], "increase"),
        ([(0, {"a": 0})], "positive"),
        ([(0, {"a": -1, "b": 3})], "positive"),
        ([(0, {"a": "x"})], "want numbers"),
        ([(0, {"a": None})], "want numbers"),
        ([(0, {"a": float("nan")})], "want numbers"),
        ([(0, {"a": float("inf"), "b": 1})], "want numbers"),
        ([(0, [1, 2])], "mapping of sources"),
    ],
)
def test_bad_mixtures_say_what_is_wrong(two, stages, message):
    with pytest.raises(DatasetError, match=message):
        Mixture(two, stages)


def test_sources_of_other_contexts_are_refused(byte_data, two):
    with pytest.raises(DatasetError, match="differ in context"):
        Mixture({**two, "c": byte_data.view(context=16)}, [(0, {"a": 1})])


@pytest.fixture
def sided(byte_data):
    """Views of the two kinds of sidecars."""
    views = {}
    for kind in ("weight", "loss"):
        writer = SidecarWriter(byte_data, {"name": kind}, kind)
        shards = byte_data.splits["train"].shards
        for shard in shards:
            writer.write(shard, np.full(shard.tokens, 0.5))
        writer.finish(shards)
        views[kind] = byte_data.view(context=32, seed=1, sidecar=writer.name)
    return views


def test_weights_of_one_source_weigh_there_alone(two, sided):
    mixture = Mixture({"a": sided["weight"], "b": two["a"]}, [(0, {"a": 1, "b": 1})])
    batch = mixture.batch(0, 4)
    assert batch.sidecar is None
    assert sorted(batch.weights.mean(1).tolist()) == [0.5, 0.5, 1, 1]
    alone = Mixture({"a": sided["weight"], "b": two["a"]}, [(0, {"a": 1})]).batch(0, 4)
    assert torch.equal(alone.weights, sided["weight"].batch(0, 4).weights)


def test_reference_losses_are_needed_of_every_source(two, sided):
    both = Mixture({"a": sided["loss"], "b": sided["loss"]}, [(0, {"a": 1, "b": 1})])
    assert both.side_kind == "loss" and (both.batch(0, 4).sidecar == 0.5).all()
    for other in (two["a"], sided["weight"]):
        with pytest.raises(DatasetError, match="do not go together"):
            Mixture({"a": sided["loss"], "b": other}, [(0, {"a": 1, "b": 1})])


@pytest.mark.parametrize("packing", ["concat", "best_fit", "documents"])
def test_length_schedule_cuts_rows_and_loses_nothing(byte_data, packing):
    view = byte_data.view(context=96, packing=packing)
    schedule = LengthSchedule(view, [(0, 24), (2, 48), (4, 96)])
    for step, context in enumerate([24, 24, 48, 48, 96, 96]):
        long, short = view.batch(step, 4), schedule.batch(step, 4)
        assert schedule.context_at(step) == context and short.tokens.shape == (4 * 96 // context, context)
        assert torch.equal(short.tokens.flatten(), long.tokens.flatten())
        assert set(short.cu_seqlens.tolist()) == set(long.cu_seqlens.tolist()) | set(range(0, 385, context))
        assert short.bytes == long.bytes
        if long.weights is not None:
            assert torch.equal(short.weights.flatten(), long.weights.flatten())
            assert int(short.lengths.sum()) == int(long.lengths.sum())


def test_contexts_that_do_not_divide_are_refused(byte_data):
    with pytest.raises(DatasetError, match="does not divide"):
        LengthSchedule(byte_data.view(context=96), [(0, 36)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**63))
def test_block_shuffle_is_a_bijection_that_keeps_blocks_near(n, key):
    order = BlockPermutation(n, key)
    out = order(np.arange(n))
    assert np.array_equal(np.sort(out), np.arange(n))
    first = out[:1024] // 64  # one window reads at most 16 blocks and the loose end
    assert len(np.unique(first)) <= 17


def test_block_shuffled_views_hold_every_row(byte_data):
    view = byte_data.view(context=16, shuffle="block")
    assert np.array_equal(np.sort(view.locate(np.arange(view.rows))), np.arange(view.rows))
    assert view.id != byte_data.view(context=16).id


def test_build_from_settings(byte_data):
    path = str(byte_data.path)
    plain = dataset.build(path, context=32, seed=3)
    assert plain.id == byte_data.view(context=32, seed=3).id
    mixed = dataset.build(
        {
            "sources": {"x": path, "y": {"path": path, "packing": "best_fit"}},
            "stages": [{"at": 0, "weights": {"x": 1}}, {"at": 0.8, "weights": {"x": 1, "y": 1}}],
            "lengths": [{"at": 0, "context": 8}, {"at": 0.5, "context": 32}],
        },
        context=32,
        total_steps=10,
        global_batch=4,
    )
    assert mixed.batch(0, 4).tokens.shape == (16, 8) and mixed.batch(5, 4).tokens.shape == (4, 32)
    inner = mixed._view
    source, _ = inner.locate(np.arange(40))
    assert (source[:32] == 0).all() and (source[32:] == 1).sum() == 4


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"source": {}}, "did you mean 'sources'"),
        ({"sources": {}}, "mapping of names"),
        ({"sources": {"a": {"packing": "concat"}}}, "'path' is missing"),
        ({"sources": {"a": {"path": "x", "pack": 1}}}, "did you mean 'packing'"),
    ],
)
def test_bad_settings_name_the_key(settings_, message):
    with pytest.raises(DatasetError, match=message):
        dataset.build(settings_, context=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {"a": None}}, r"data\.sources\.a: None is no path"),
        ({"sources": {"a": {"path": 3}}}, r"data\.sources\.a: 3 is no path"),
        ({"sources": {"a": {"path": "{}", "min_tokens": "a"}}}, "min_tokens 'a': a whole number"),
        ({"sources": {"a": {"path": "{}", "packing": []}}}, "packing .*: allowed are"),
        ({"stages": 3}, r"data\.stages: a list"),
        ({"stages": [{"at": 0, "weights": 3}]}, "mapping of sources"),
        ({"stages": [{"at": float("nan"), "weights": {"a": 1}}]}, r"stages\[0\]\.at: nan is neither"),
        ({"stages": [{"at": 1.5, "weights": {"a": 1}}]}, r"stages\[0\]\.at: 1\.5 is neither"),
        ({"lengths": [{"at": 0, "context": "a"}]}, "context 'a' does not divide"),
        ({"lengths": [{"at": 0, "context": 2.0}]}, r"context 2\.0 does not divide"),
    ],
)
def test_settings_of_another_type_are_refused(byte_data, change, message):
    settings_ = {"sources": {"a": str(byte_data.path)}} | change
    for one in settings_["sources"].values():
        if isinstance(one, dict) and one["path"] == "{}":
            one["path"] = str(byte_data.path)
    with pytest.raises(DatasetError, match=message):
        dataset.build(settings_, context=8)
