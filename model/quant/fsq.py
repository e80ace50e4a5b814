"""Finite scalar quantization: every channel by itself onto a fixed grid; no codebook, no extra loss.

Shape legend: B batch  T time  D model width  C channels of the code

After Mentzer et al., "Finite scalar quantization" (arXiv 2309.15505): bound smoothly, round, pass the
gradient straight through. The bound is s = tanh(k z) with k = 0.8, near the cumulative distribution of a
unit Gaussian (erf(z / sqrt 2)): L equal bins of s are then about equally likely, so that all levels are used
and a level carries close to log2 L bits. A level is read out as atanh(middle of its bin) / k, in z's own
units. Hence the smooth part of the map is the identity: the gradient is 1 (0 beyond +-4, where z would
drift), quantizing twice changes nothing, and the bracket starts near the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.core import Aux
from model.quant.base import Quantizer, code_stats, straight_through
from model.registry import quantizer

SLOPE = 0.8  # of the squash: tanh(0.8 z) is within 0.02 of erf(z / sqrt 2)
REACH = 4.0  # gradients pass for |z| <= REACH; the outermost of 256 levels reads 3.9


class ScalarQuantizer(Quantizer):
    """Channels on fixed grids of `levels` [C] values each."""

    levels: Tensor

    def __init__(self, dim: int, levels: list[int], *, norm: bool = True) -> None:
        super().__init__(dim, channels=len(levels), norm=norm)
        if min(levels) < 2:
            raise ValueError(f"levels={levels}: a channel needs at least 2 levels")
        self._bits = sum(math.log2(n) for n in levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)

    @property
    def bits_per_token(self) -> float:
        return self._bits

    def encode_z(self, z: Tensor) -> Tensor:
        """z [..., C] -> levels, int64 [..., C], 0 for the lowest."""
        level = torch.floor((torch.tanh(SLOPE * z) + 1) * (self.levels / 2)).to(torch.int64)
        return torch.minimum(level.clamp_min(0), self.levels - 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Levels [..., C] -> grid values [..., C], fp32. Raises IndexError for a level there is not."""
        if not torch.compiler.is_compiling() and bool(((codes < 0) | (codes >= self.levels)).any()):
            raise IndexError(f"a code is outside 0..levels-1, levels {self.levels.tolist()}")
        return self._grid(codes, torch.float32)

    def _grid(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.atanh((2 * codes.to(dtype) + 1) / self.levels - 1) / SLOPE

    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        with torch.no_grad():
            codes = self.encode_z(z)
            grid = self._grid(codes, z.dtype)
            stats = code_stats(codes, self.levels, keep, self._bits)
        return straight_through(self.bound(z), grid), Aux(stats=stats)

    def bound(self, z: Tensor) -> Tensor:
        return z.clamp(-REACH, REACH)


@quantizer("fsq")
class FSQ(ScalarQuantizer):
    """`levels` values a channel: one number for all `channels`, or a list with one number for each.

    Raises ValueError when the list's length is not `channels`, or a number is below 2.
    """

    def __init__(
        self, dim: int, *, channels: int | None = None, levels: int | list[int] = 8, norm: bool = True
    ) -> None:
        if isinstance(levels, int):
            levels = [levels] * (32 if channels is None else channels)
        if channels is not None and len(levels) != channels:
            raise ValueError(f"levels has {len(levels)} numbers for channels={channels}")
        super().__init__(dim, list(levels), norm=norm)


@quantizer("int8")
class Int8(ScalarQuantizer):
    """8 bits a channel: `fsq` with 256 levels."""

    def __init__(self, dim: int, *, channels: int = 32, norm: bool = True) -> None:
        super().__init__(dim, [256] * channels, norm=norm)


@quantizer("none")
class Unquantized(Quantizer):
    """The bracket without rounding: what its width alone costs."""

    def __init__(self, dim: int, *, channels: int = 32, norm: bool = True) -> None:
        super().__init__(dim, channels=channels, norm=norm)

    @property
    def bits_per_token(self) -> float:
        return 32.0 * self.code_dim

    def encode_z(self, z: Tensor) -> Tensor:
        """z [..., C] -> the bits of its fp32 values as int64 [..., C]: lossless."""
        return z.float().contiguous().view(torch.int32).to(torch.int64)

    def decode_codes(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int32).view(torch.float32)

    def quantize(self, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Aux]:
        return z, Aux()
