"""The data order is arithmetic: a keyed bijection on 0..n-1, computed where it is asked for.

A Feistel network on just enough bits to cover n, walked until it lands inside (cycle walking), so that
it needs no table at any n. `Permutation(n, key)(i)` is the i-th row of an epoch; `inverse` finds it back.
"""

from __future__ import annotations

import blake3
import numpy as np

ROUNDS = 6
CHUNK = 4096  # numpy's call overhead is shared by this many ids


def derive(*parts: object) -> int:
    """A 64-bit key from anything printable, the same on every machine."""
    return int.from_bytes(blake3.blake3(repr(parts).encode()).digest(8), "little")


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit and on the key."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A bijection of 0..n-1, keyed; n up to 2^63. Calls take and give int64 arrays."""

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, got {n}")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._high = np.uint64(bits - bits // 2)
        self._keys = [np.uint64(derive(key, r)) for r in range(ROUNDS)]
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return self._walk(ids, self._forward)

    def inverse(self, ids: np.ndarray) -> np.ndarray:
        return self._walk(ids, self._backward)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The same as a call, for increasing ids: computes CHUNK at a time and keeps the last.
        Not to be written to."""
        if not len(ids):
            return ids
        first, last = int(ids[0]), int(ids[-1])
        chunk = first // CHUNK
        start = chunk * CHUNK
        if last // CHUNK != chunk:
            return self(ids)
        known, block = self._block  # read once: another thread may replace it
        if known != chunk:
            block = self(np.arange(start, min(self.n, start + CHUNK), dtype=np.int64))
            self._block = (chunk, block)
        if last - first == len(ids) - 1:
            return block[first - start : last + 1 - start]
        return block[ids - start]

    def _walk(self, ids: np.ndarray, step) -> np.ndarray:
        x = np.asarray(ids, np.uint64)
        if x.size and (int(x.max()) >= self.n):
            raise ValueError(f"ids must lie in 0..{self.n - 1}, got {int(x.max())}")
        x = step(x)
        out = np.flatnonzero(x >= self.n)
        while out.size:  # the domain is below 4n (2n past n = 2), so few passes are needed
            x[out] = step(x[out])
            out = out[x[out] >= self.n]
        return x.astype(np.int64)

    def _halves(self, r: int) -> tuple[np.uint64, np.uint64]:
        """Bits of the left and right part before round r: they swap with every round."""
        return (self._high, self._low) if r % 2 == 0 else (self._low, self._high)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        one = np.uint64(1)
        for r, key in enumerate(self._keys):
            wide, narrow = self._halves(r)
            left, right = x >> narrow, x & ((one << narrow) - one)
            left = left ^ (_mix(right, key) & ((one << wide) - one))
            x = (right << wide) | left
        return x

    def _backward(self, x: np.ndarray) -> np.ndarray:
        one = np.uint64(1)
        for r in reversed(range(ROUNDS)):
            wide, narrow = self._halves(r)
            right, left = x >> wide, x & ((one << wide) - one)
            left = left ^ (_mix(right, self._keys[r]) & ((one << wide) - one))
            x = (left << narrow) | right
        return x


class BlockPermutation:
    """A bijection of 0..n-1 for cold or remote data: whole blocks move, then rows within a window of blocks.

    Rows of a window (`window` blocks of `block` rows) come from `window` places in the files, so a window's
    reads can be fetched together; the state is the same one integer.
    """

    def __init__(self, n: int, key: int, block: int = 64, window: int = 16) -> None:
        self.n, self._block, self._span, self._key = n, block, block * window, key
        self._blocks = n // block  # the rows after the last whole block stay at the end
        self._moved = Permutation(max(self._blocks, 1), derive(key, "blocks"))

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        mixed = np.empty_like(ids)
        for w in np.unique(ids // self._span).tolist():
            here = ids // self._span == w
            start = w * self._span
            local = Permutation(min(self._span, self.n - start), derive(self._key, "window", w))
            mixed[here] = local(ids[here] - start) + start
        whole = mixed < self._blocks * self._block
        number, within = np.divmod(mixed[whole], self._block)
        mixed[whole] = self._moved(number) * self._block + within
        return mixed

    take = __call__


def chairman(weights: list[int]) -> np.ndarray:
    """int32 [sum of weights]: which source each draw of a period comes from.

    After any n draws every source i was drawn within 1 of n*w_i/sum(w) times: Tijdeman's schedule for the
    chairman assignment problem (1980). Of the sources that may be drawn without getting ahead, the one that
    would first fall behind is drawn.
    """
    total = sum(weights)
    k = sum(w > 0 for w in weights)
    slack = total * (2 * k - 2)  # everything is scaled by total*(2k-2), so that it stays in integers
    counts = [0] * len(weights)
    table = np.empty(total, np.int32)
    for n in range(1, total + 1):
        best, pick = None, -1
        for i, w in enumerate(weights):
            lead = (n * w - counts[i] * total) * (2 * k - 2)
            if w and (k == 1 or lead >= total):
                urgency = (slack - total - lead) / w
                if best is None or urgency < best:
                    best, pick = urgency, i
        table[n - 1] = pick
        counts[pick] += 1
    return table
