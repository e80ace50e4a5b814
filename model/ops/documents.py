"""What operators need to know of documents.

Operators import nothing but torch; this is the shape of `model.core.Docs` as they see it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Documents(Protocol):
    """Where documents lie in a batch; see `model.core.Docs`, whose fields these are."""

    @property
    def positions(self) -> Tensor: ...  # [B, T] int64, from 0 in each document

    @property
    def segments(self) -> Tensor: ...  # [B, T] int64, never decreasing along a row; -1 is padding

    @property
    def cu_seqlens(self) -> Tensor: ...  # [N+1] int32 over the flattened B*T

    @property
    def padded(self) -> bool: ...  # any segment is -1

    @property
    def max_len(self) -> int: ...  # the longest document

    @property
    def tokens(self) -> Tensor: ...  # [B, T] bool: not padding

    def first_segment(self) -> Tensor: ...  # [B], -2 for a row of padding

    def last_segment(self) -> Tensor: ...  # [B], -2 for a row of padding


def zero_padding(docs: Documents | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs [B, T, ...] with zeros where there is no token, whatever lies there, even NaN."""
    if docs is None or not docs.padded:
        return inputs
    here = docs.segments >= 0
    return tuple(torch.where(here.view(*here.shape, *[1] * (x.dim() - 2)), x, 0) for x in inputs)
