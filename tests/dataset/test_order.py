"""The order is a bijection at every size, the same at every world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.files import DatasetError
from dataset.order import Permutation
from dataset.views import local_samples


def test_every_small_size_is_a_bijection():
    for n in range(1, 1500):
        ids = np.arange(n)
        out = Permutation(n, key=n)(ids)
        assert np.array_equal(np.sort(out), ids)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**20), st.integers(0, 2**64 - 1))
def test_random_sizes_are_bijections_with_inverse(n, key):
    permutation = Permutation(n, key)
    ids = np.arange(n)
    out = permutation(ids)
    assert np.bincount(out, minlength=n).max() == 1
    assert np.array_equal(permutation.inverse(out), ids)


@settings(max_examples=50, deadline=None)
@given(st.integers(2**32, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_inverse_past_32_bits(n, key, data):
    permutation = Permutation(n, key)
    ids = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50)), np.int64)
    out = permutation(ids)
    assert ((out >= 0) & (out < n)).all()
    assert np.array_equal(permutation.inverse(out), ids)


def test_take_equals_call_across_chunks():
    permutation = Permutation(10_000, 3)
    for first in (0, 4090, 4096, 9990):
        ids = np.arange(first, min(first + 20, 10_000))
        assert np.array_equal(permutation.take(ids), permutation(ids))


def test_keys_give_unrelated_orders():
    ids = np.arange(10_000)
    a, b = Permutation(10_000, 1)(ids), Permutation(10_000, 2)(ids)
    assert (a == b).mean() < 0.01
    assert abs(np.corrcoef(ids, a)[0, 1]) < 0.05
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.05


def test_ids_outside_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.9"):
        Permutation(10, 0)(np.array([10]))


@pytest.mark.parametrize("world", [0, 5, 96 * 2])
def test_a_batch_that_does_not_divide_is_refused(world):
    with pytest.raises(DatasetError, match="does not divide"):
        local_samples(0, 96, 0, world)


def test_rank_outside_world_is_refused():
    with pytest.raises(DatasetError, match="outside"):
        local_samples(0, 96, 4, 4)
