"""Rotary position embedding (Su et al., arXiv 2104.09864), in the halves form of Llama and transformers.

Shape legend: B batch  T time  H heads  K head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.dtypes import at_least_fp32


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, K] by tables [B or 1, T, 1, K/2], in the tables' precision; returns x.dtype."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def check_rope(width: int, theta: float) -> None:
    """Raises ValueError for an odd head width, whose channels make no pairs, and for theta <= 0."""
    if width % 2:
        raise ValueError(f"RoPE turns pairs of channels: the head width must be even, got {width}")
    if theta <= 0:
        raise ValueError(f"theta={theta}: the base of RoPE's angles must be above 0")


def rope_tables(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [B, T, 1, width/2], for positions [B, T]; angle i is position * theta^(-2i/width).

    fp32, or fp64 for fp64 inputs: positions beyond 256 do not survive bf16.
    Raises ValueError for an odd width or theta <= 0.
    """
    check_rope(width, theta)
    dtype = at_least_fp32(dtype)
    powers = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    angle = positions[:, :, None, None].to(dtype) * (theta**-powers).to(dtype)
    return angle.cos(), angle.sin()
