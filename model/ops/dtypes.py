"""In which dtype operators count, and in which powers decays are taken."""

from __future__ import annotations

import torch

# Decays are taken as exp2(log_a * LOG2_E): on a CPU torch's exp takes 12 to 100 times as long wherever its
# result is below the smallest normal number, -inf included, and half of a mask is that.
LOG2_E = 1.4426950408889634


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays, sums and states for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
