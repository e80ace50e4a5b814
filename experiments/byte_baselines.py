"""What a model's bits per byte must be held against: an order-2 byte model, and xz.

Both see the same training bytes and the same held-out bytes as the model that they stand beside.
"""

from __future__ import annotations

import lzma

import numpy as np


def order_n_bits(train: bytes, heldout: bytes, order: int = 2) -> float:
    """Bits per held-out byte of an order-n byte model with Witten-Bell interpolation.

    P_n(b | c) = (count(c, b) + t(c) P_{n-1}(b | c')) / (count(c) + t(c)), t(c) the number of different
    bytes seen after context c, c' the context without its oldest byte; P_{-1} = 1/256
    (Witten and Bell, IEEE Trans. Inf. Theory 37(4), 1991). Tables are dense: order <= 2.
    Raises ValueError for other orders or for no held-out bytes.
    """
    if not 0 <= order <= 2:
        raise ValueError(f"order {order}: tables are dense, so 0, 1 or 2")
    if not heldout:
        raise ValueError("no held-out bytes to score")
    a = np.frombuffer(train, np.uint8).astype(np.int64)
    b = np.frombuffer(heldout, np.uint8).astype(np.int64)
    prob = np.full(len(b), 1 / 256)
    for n in range(order + 1):
        size = 256**n
        counts = np.bincount(_contexts(a, n) * 256 + a[n:], minlength=size * 256).reshape(size, 256)
        total, kinds = counts.sum(1), (counts > 0).sum(1)
        context = _contexts(b, n)
        seen = total[context] > 0
        mixed = (counts[context, b[n:]] + kinds[context] * prob[n:]) / np.maximum(total + kinds, 1)[context]
        prob[n:] = np.where(seen, mixed, prob[n:])
    return float(-np.log2(prob).mean())


def _contexts(x: np.ndarray, n: int) -> np.ndarray:
    """The number of the n bytes before each position n, n+1, ..."""
    out = np.zeros(len(x) - n, np.int64)
    for k in range(n):
        out = out * 256 + x[k : len(x) - n + k]
    return out


def xz_bits(heldout: bytes) -> float:
    """Bits per byte of the held-out text in one xz file at the highest setting."""
    return 8 * len(lzma.compress(heldout, preset=9 | lzma.PRESET_EXTREME)) / len(heldout)
