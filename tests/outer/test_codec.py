"""Codecs: every code round trips, strange values are kept or refused, error feedback loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.outer import codec
from train.outer.codec import BLOCK, CHUNK, CODECS, Sender, make

NAMES = st.sampled_from(CODECS)


def vector(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 2, n)).astype("float32")


@given(NAMES, st.integers(1, 3 * CHUNK), st.integers(0, 9))
def test_size_and_second_encoding(name: str, n: int, seed: int) -> None:
    """A decoded vector encodes to itself, and takes the bytes that it was said to take."""
    c, x = make(name), vector(n, seed)
    code = c.encode(x)
    assert code.dtype == np.uint8 and code.shape == (c.size(n),)
    once = c.decode(code, n)
    assert once.dtype == np.float32 and once.shape == (n,)
    twice = c.decode(c.encode(once), n)
    np.testing.assert_allclose(twice, once, rtol=2e-7, atol=0)


def test_every_e3m0_code() -> None:
    levels = np.array([0, *(2.0**-j for j in range(6, -1, -1))], "float32")
    x = np.zeros(BLOCK, "float32")
    x[:16] = 3.5 * np.concatenate([levels, -levels])
    code = codec.E3M0().encode(x)
    nibbles = np.stack([code[4:] & 15, code[4:] >> 4], 1).reshape(-1)
    assert set(nibbles) == set(range(16)) - {8}  # 8 would be minus zero, which is sent as zero
    np.testing.assert_array_equal(codec.E3M0().decode(code, BLOCK), x)


def test_e3m0_rounds_to_the_nearest_level() -> None:
    x = np.linspace(-1, 1, BLOCK).astype("float32")
    levels = np.array([0, *(2.0**-j for j in range(7))])
    levels = np.concatenate([levels, -levels])
    got = codec.E3M0().decode(codec.E3M0().encode(x), BLOCK)
    best = np.abs(x[:, None] - levels[None]).min(1)
    np.testing.assert_allclose(np.abs(got - x), best, atol=1e-7)


def test_every_int8_code() -> None:
    x = np.zeros(BLOCK, "float32")
    x[:255] = np.arange(-127, 128)
    np.testing.assert_array_equal(codec.Int8().decode(codec.Int8().encode(x), BLOCK), x)


def test_bf16_is_that_of_torch() -> None:
    import torch

    x = np.concatenate([vector(5000), [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 3.4e38]]).astype("float32")
    want = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(make("bf16").decode(make("bf16").encode(x), len(x)), want)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_arrive_as_such(name: str, bad: float) -> None:
    x = vector(2 * CHUNK)
    x[77] = bad
    assert not np.isfinite(make(name).decode(make(name).encode(x), len(x))).all()


@pytest.mark.parametrize("name", CODECS)
def test_zero_and_denormal_blocks(name: str) -> None:
    zero = np.zeros(300, "float32")
    np.testing.assert_array_equal(make(name).decode(make(name).encode(zero), 300), zero)
    tiny = np.full(300, 1e-41, "float32")
    got = make(name).decode(make(name).encode(tiny), 300)
    assert np.isfinite(got).all() and np.abs(got).max() <= 1.1e-41


@given(NAMES, st.integers(0, 99))
def test_error_feedback_loses_nothing(name: str, seed: int) -> None:
    """Residual + sent = input, summed over many sends."""
    n = CHUNK + 100
    sender, total, arrived = Sender(make(name), n), np.zeros(n), np.zeros(n)
    for i in range(5):
        x = np.random.default_rng(seed + i).standard_normal(n).astype("float32")
        arrived += sender.codec.decode(sender.encode(x), n)
        total += x
    left = 0 if sender.residual is None else sender.residual
    np.testing.assert_allclose(arrived + left, total, atol=2e-5)


def test_topk_keeps_the_largest() -> None:
    x = vector(CHUNK)
    got = make("topk", 0.01).decode(make("topk", 0.01).encode(x), CHUNK)
    assert (got != 0).sum() == 41
    assert np.abs(x[got != 0]).min() >= np.abs(x[got == 0]).max()


def test_sizes() -> None:
    """Bytes a value: what the traffic figures rest on."""
    n = 1 << 20
    sizes = {name: make(name).size(n) / n for name in CODECS}
    assert sizes == {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256, "e3m0": 0.5 + 4 / 256, "topk": 4 / 64}


def test_an_unknown_codec() -> None:
    with pytest.raises(ValueError, match="allowed are fp32"):
        make("fp8")
