"""What a ring of past states carries between calls.

Shape legend: B batch  H heads  P head width  G groups  N state width  R slots
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.dtypes import at_least_fp32


class RingState(NamedTuple):
    """Of each row's last document: its last R finished segments, right-aligned, and the open one.

    past [B, R, H, N, P]: W of the segments.    keys [B, R, G, N]: their mean keys.
    open [B, H, N, P]: what the open segment wrote so far.    open_key [B, G, N]: sum of its keys.
    seen [B] int64: tokens of the document so far.
    """

    past: Tensor
    keys: Tensor
    open: Tensor
    open_key: Tensor
    seen: Tensor

    @staticmethod
    def empty(like: Tensor, batch: int, slots: int, H: int, P: int, G: int, N: int) -> RingState:
        """fp32, or fp64 if `like` is."""
        dtype = at_least_fp32(like.dtype)
        shapes = (slots, H, N, P), (slots, G, N), (H, N, P), (G, N)
        parts = [like.new_zeros(batch, *shape, dtype=dtype) for shape in shapes]
        return RingState._make([*parts, torch.zeros(batch, dtype=torch.int64, device=like.device)])
