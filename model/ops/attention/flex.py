"""FlexAttention (torch) on CUDA: any documents, windows and caches, without a [T, S] mask in memory.

Shape legend: B batch  T queries  S keys  H query heads  G key/value heads  K head width

Compiled, it needs a GPU for training: its CPU kernel has no backward. Uncompiled it runs anywhere, slowly,
which is how its masks are tested.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from model.ops.attention.places import Places, resolve
from model.ops.documents import Documents

MIN_QUERIES = 128  # one block of queries; below it a dense mask is small and the kernel idles


def supports_flex(
    q: Tensor,
    *,
    docs: Documents | None = None,
    at: Any = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    lifetime: Tensor | None = None,
    **_: Any,
) -> str | None:
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device.type}"
    if q.dtype == torch.float64:
        return "needs fp32, fp16 or bf16, got torch.float64"
    if q.shape[-1] < 16 or q.shape[1] < MIN_QUERIES:
        return f"needs head widths from 16 and {MIN_QUERIES} queries, got {q.shape[-1]} and {q.shape[1]}"
    if docs is None and at is None and window is None and slopes is None:
        return "whole causal rows have a kernel of their own in torch ('cpu')"
    if lifetime is not None:
        return "has no keys of limited lifetime"
    return None if sinks is None else "has no learned sinks"


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    docs: Documents | None = None,
    at: Places | None = None,
    key_at: Places | None = None,
    window: int | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """See `attend`."""
    create_block_mask, kernel = _torch_flex(q.is_cuda)
    at, key_at = resolve(q, k, docs, at, key_at)
    (position, segment), (key_position, key_segment) = at, key_at

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = position[b, i] - key_position[b, j]
        same = (segment[b, i] == key_segment[b, j]) & (segment[b, i] >= 0) & (distance >= 0)
        return same if window is None else same & (distance < window)

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[h] * (position[b, i] - key_position[b, j])

    mask = create_block_mask(seen, q.shape[0], None, q.shape[1], k.shape[1], device=q.device.type)
    y = kernel(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if slopes is None else alibi,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


@functools.cache
def _torch_flex(compiled: bool) -> tuple[Any, Any]:
    """(create_block_mask, flex_attention). Both are compiled: the first, as it is, makes [B, T, S] numbers
    of 8 bytes on its way to the blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask, dynamic=True), torch.compile(flex_attention, dynamic=True)
