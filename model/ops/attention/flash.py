"""FlashAttention 2 (the flash-attn package) on CUDA: packed documents by cu_seqlens, windows, ALiBi.

Shape legend: B batch  T queries  S keys  H query heads  G key/value heads  K head width

The package cannot run without a GPU; its call is tested against a stand-in with its documented semantics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.ops.documents import Documents


def supports_flash(
    q: Tensor, *, v: Tensor, at: Any = None, sinks: Tensor | None = None, lifetime: Any = None, **_: Any
) -> str | None:
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device.type}"
    if q.numel() == 0:
        return "an empty input has nothing to launch"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, got {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] != v.shape[-1]:
        return f"needs equal head widths up to 256, got {q.shape[-1]} and {v.shape[-1]}"
    if at is not None:
        return "takes whole rows or packed documents, not a cache with places of its own"
    if lifetime is not None:
        return "has no keys of limited lifetime"
    return None if sinks is None else "has no learned sinks"


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    docs: Documents | None = None,
    window: int | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """See `attend`. Padding runs are attended to as documents of their own and zeroed afterwards."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    common = {
        "causal": True,
        "softmax_scale": scale,
        "window_size": (-1 if window is None else window - 1, 0 if window is not None else -1),
        "alibi_slopes": None if slopes is None else slopes.float(),
    }
    if docs is None:
        return flash_attn_func(q, k, v, **common)  # causal to the bottom right: the past stands in front
    cu = docs.cu_seqlens.to(device=q.device, dtype=torch.int32)
    # A padding run may be longer than the longest document.
    longest = q.shape[1] if docs.padded else docs.max_len
    y = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, cu, longest, longest, **common
    )
    y = y.unflatten(0, q.shape[:2])
    return torch.where((docs.segments >= 0)[..., None, None], y, 0.0) if docs.padded else y
