import math

import numpy as np
import pytest

from experiments.byte_baselines import order_n_bits, xz_bits


def test_probabilities_sum_to_one_and_match_a_loop():
    rng = np.random.default_rng(0)
    train = bytes(rng.choice([97, 98, 99], 400).astype(np.uint8))

    def prob(context: bytes, b: int, n: int) -> float:
        if n < 0:
            return 1 / 256
        c = context[len(context) - n :]
        after = [train[i + n] for i in range(len(train) - n) if train[i : i + n] == c]
        lower = prob(context, b, n - 1)
        if not after:
            return lower
        kinds = len(set(after))
        return (after.count(b) + kinds * lower) / (len(after) + kinds)

    assert math.isclose(sum(prob(b"ab", b, 2) for b in range(256)), 1.0)
    text = b"abcz!ab"
    want = -sum(math.log2(prob(text[:i], b, min(i, 2))) for i, b in enumerate(text)) / len(text)
    assert math.isclose(order_n_bits(train, text), want)


def test_higher_orders_use_more_context():
    train, heldout = b"abcabd" * 500, b"abcabd" * 50
    bits = [order_n_bits(train, heldout, n) for n in range(3)]
    assert bits[0] > bits[1] > bits[2]
    assert xz_bits(heldout) < 8


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no held-out"):
        order_n_bits(b"abc", b"")
