"""Attention as the textbook has it: one dense masked softmax, in fp32 or fp64.

Shape legend: B batch  T queries  S keys  H query heads  G key/value heads  K key width  V value width
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.attention.places import Places, resolve, visible
from model.ops.documents import Documents
from model.ops.dtypes import at_least_fp32


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    docs: Documents | None = None,
    at: Places | None = None,
    key_at: Places | None = None,
    window: int | None = None,
    span: int | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    lifetime: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k' - slope * distance) v over what the query may see; see `attend`.

    A learned sink is one more logit in the denominator that carries no value.
    """
    at, key_at = resolve(q, k, docs, at, key_at)
    work = at_least_fp32(q.dtype)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.to(work).repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthk,bshk->bhts", q.to(work) * scale, keys)
    if slopes is not None:
        distance = at.positions[:, None, :, None] - key_at.positions[:, None, None, :]
        logits = logits - slopes.to(work)[:, None, None] * distance
    seen = visible(at, key_at, window, lifetime)[:, None]
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        extra = sinks.to(work)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], dim=-1)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(work).min) if logits.shape[-1] else logits
    weight = torch.exp(logits - top.detach())
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(work).tiny)
    y = torch.einsum("bhts,bshv->bthv", weight[..., : k.shape[1]], values)
    return y.to(q.dtype)
