"""What a vector looks like on the wire: fp32, bf16, int8, E3M0 (4 bits), top-k; and error feedback.

Shape legend: N values of a vector  G blocks  b values of a block  k values kept of a block.

A codec turns fp32 [N] into uint8 [size(N)] and back. Blocks of int8 and E3M0 carry a fp32 scale of their
own, their largest magnitude. A block that holds something non-finite decodes to non-finite values, so that
whoever receives it can refuse it. Rounding is to nearest, and deterministic.

    int8   q = round(127 x / s),                      1.016 bytes a value (b = 256)
    e3m0   sign and exponent, no mantissa: s * {0, 2^-6, ..., 2^0}   (Douillard et al. 2501.18512)
                                                      0.516 bytes a value (b = 256)
    topk   of every 4096 values the k largest, as bf16 with a 16-bit place   (2508.15706 does the same
           per chunk); everything else is zero, which is what error feedback is for
"""

from __future__ import annotations

from typing import Any, Protocol

from train.outer.arrays import Array, namespace

BLOCK = 256  # values under one scale
CHUNK = 4096  # values among which the largest are chosen


class Codec(Protocol):
    """fp32 [N] -> uint8 [size(N)] -> fp32 [N]."""

    name: str

    def size(self, n: int) -> int: ...
    def encode(self, x: Array) -> Array: ...
    def decode(self, code: Array, n: int) -> Array: ...


def _bytes(x: Array) -> Array:
    return namespace(x).ascontiguousarray(x).view("uint8").reshape(-1)


def _blocks(x: Array, b: int) -> Array:
    """[N] -> [G, b], the last block filled up with zeros."""
    xp, n = namespace(x), x.shape[0]
    if n % b:
        x = xp.concat([x, xp.zeros(b - n % b, dtype=x.dtype)])
    return x.reshape(-1, b)


class Raw:
    """The values themselves. float64 serves tests that need more than fp32."""

    def __init__(self, dtype: str = "float32") -> None:
        self.name, self.dtype, self.width = f"fp{dtype[5:]}", dtype, int(dtype[5:]) // 8

    def size(self, n: int) -> int:
        return n * self.width

    def encode(self, x: Array) -> Array:
        return _bytes(x.astype(self.dtype))

    def decode(self, code: Array, n: int) -> Array:
        return code.view(self.dtype)[:n].copy()


class BF16:
    """The upper half of a fp32, rounded to nearest even."""

    name = "bf16"

    def size(self, n: int) -> int:
        return 2 * n

    def encode(self, x: Array) -> Array:
        return _bytes(to_bf16(x))

    def decode(self, code: Array, n: int) -> Array:
        return from_bf16(code.view("uint16")[:n])


def to_bf16(x: Array) -> Array:
    """fp32 [...] -> the bits of its bf16, uint16 [...]. A NaN stays one."""
    xp = namespace(x)
    u = xp.ascontiguousarray(x.astype("float32")).view("uint32")
    rounded = (u + (((u >> 16) & 1) + 0x7FFF).astype("uint32")) >> 16
    return xp.where(xp.isnan(x), xp.full_like(rounded, 0x7FC0), rounded).astype("uint16")


def from_bf16(bits: Array) -> Array:
    return (bits.astype("uint32") << 16).view("float32")


class Int8:
    """Symmetric, 255 levels a block."""

    name = "int8"

    def size(self, n: int) -> int:
        groups = -(-n // BLOCK)
        return groups * (4 + BLOCK)

    def encode(self, x: Array) -> Array:
        xp = namespace(x)
        rows, scale = _scaled(x)
        return xp.concat([_bytes(scale), _bytes(xp.round(rows * 127).astype("int8"))])

    def decode(self, code: Array, n: int) -> Array:
        groups = -(-n // BLOCK)
        scale, q = code[: 4 * groups].view("float32"), code[4 * groups :].view("int8")
        return (q.reshape(groups, BLOCK).astype("float32") * (scale / 127)[:, None]).reshape(-1)[:n]


class E3M0:
    """A sign bit and three exponent bits a value, two values a byte."""

    name = "e3m0"

    def size(self, n: int) -> int:
        groups = -(-n // BLOCK)
        return groups * (4 + BLOCK // 2)

    def encode(self, x: Array) -> Array:
        xp = namespace(x)
        rows, scale = _scaled(x)
        size = xp.abs(rows)
        # The border between 2^-j and 2^-(j-1) is 1.5 * 2^-j; the one between 0 and 2^-6 is 2^-7.
        power = xp.floor(xp.log2(xp.maximum(size, 2.0**-9) * (4 / 3)))
        level = xp.clip(power + 7, 1, 7)
        level = xp.where(size >= 2.0**-7, level, 0).astype("uint8")
        nibble = (level | ((rows < 0).astype("uint8") << 3)).reshape(-1)
        return xp.concat([_bytes(scale), nibble[0::2] | (nibble[1::2] << 4)])

    def decode(self, code: Array, n: int) -> Array:
        xp, groups = namespace(code), -(-n // BLOCK)
        scale, packed = code[: 4 * groups].view("float32"), code[4 * groups :]
        nibble = xp.stack([packed & 15, packed >> 4], axis=1).reshape(groups, BLOCK)
        table = [0.0] + [2.0 ** (c - 7) for c in range(1, 8)]
        table = xp.asarray(table + [-v for v in table], dtype="float32")
        return (table[nibble] * scale[:, None]).reshape(-1)[:n]


class TopK:
    """The `density` share of every chunk with the largest magnitudes."""

    name = "topk"

    def __init__(self, density: float = 1 / 64) -> None:
        self.k = max(1, round(density * CHUNK))

    def size(self, n: int) -> int:
        return -(-n // CHUNK) * self.k * 4

    def encode(self, x: Array) -> Array:
        xp, rows = namespace(x), _blocks(x.astype("float32"), CHUNK)
        size = xp.where(xp.isnan(rows), xp.inf, xp.abs(rows))  # what is broken must be seen to be
        at = xp.argpartition(-size, self.k - 1, axis=1)[:, : self.k]
        values = xp.take_along_axis(rows, at, axis=1)
        return xp.concat([_bytes(at.astype("uint16")), _bytes(to_bf16(values))])

    def decode(self, code: Array, n: int) -> Array:
        xp, groups = namespace(code), -(-n // CHUNK)
        half = groups * self.k * 2
        at = code[:half].view("uint16").reshape(groups, self.k).astype("int64")
        rows = xp.zeros((groups, CHUNK), dtype="float32")
        values = from_bf16(code[half:].view("uint16")).reshape(groups, self.k)
        rows[xp.arange(groups)[:, None], at % CHUNK] = values  # a forged place must not reach outside
        return rows.reshape(-1)[:n]


def _scaled(x: Array) -> tuple[Array, Array]:
    """([G, b] within -1..1, scales fp32 [G]); a block with a non-finite value has a non-finite scale."""
    xp, rows = namespace(x), _blocks(x.astype("float32"), BLOCK)
    scale = xp.max(xp.abs(rows), axis=1)
    usable = xp.isfinite(scale) & (scale > 0)
    inside = xp.where(usable, scale, 1.0)[:, None]
    return xp.where(usable[:, None], rows, 0.0) / inside, xp.where(xp.isfinite(scale), scale, xp.nan)


CODECS = ("fp32", "bf16", "int8", "e3m0", "topk")


def make(name: str, density: float = 1 / 64) -> Codec:
    """The codec of that name. Raises ValueError."""
    if name == "topk":
        return TopK(density)
    table: dict[str, Any] = {"fp32": Raw, "fp64": lambda: Raw("float64"), "bf16": BF16}
    table |= {"int8": Int8, "e3m0": E3M0}
    if name not in table:
        raise ValueError(f"codec {name!r}: allowed are {', '.join(CODECS)}")
    return table[name]()


class Sender:
    """A codec with memory: what rounding lost is added to what is sent next (error feedback).

    residual: [N], zero at first. decode(sent) + residual = x + the residual before, up to rounding.
    """

    def __init__(self, codec: Codec, n: int, feedback: bool = True) -> None:
        self.codec, self.n = codec, n
        self.feedback = feedback and not isinstance(codec, Raw)
        self.residual: Array | None = None

    def encode(self, x: Array) -> Array:
        if not self.feedback:
            return self.codec.encode(x)
        whole = x if self.residual is None else x + self.residual
        code = self.codec.encode(whole)
        self.residual = whole - self.codec.decode(code, self.n)
        return code
