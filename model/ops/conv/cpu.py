"""Causal depthwise convolution as a sum of W shifted copies: nothing to lay out anew, all of it fusible.

Shape legend: B batch  T time  C channels  W width of the kernel.

In eager mode this equals `F.conv1d` in speed; under `torch.compile` it becomes one pass and is faster.
A tap is masked where it would cross a document start or read padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.documents import Documents


def conv_shifts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, C] and the last W-1 inputs [B, C, W-1]; arguments as in `causal_conv`."""
    B, T, C = x.shape
    back = weight.shape[1] - 1
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    before = x.new_zeros(B, back, C) if state is None else state.to(x.dtype).transpose(1, 2)
    if docs is None:
        line, owner = torch.cat([before, x], 1), None
    else:
        line, owner = _line_up(before, x, docs)
    y = None
    for k in range(back + 1):
        tap = line[:, k : k + T]
        if docs is not None and owner is not None and (k < back or docs.padded):
            own = (owner[:, k : k + T] == docs.segments) & docs.tokens
            tap = torch.where(own[:, :, None], tap, 0)
        y = tap * weight[:, k] if y is None else torch.addcmul(y, tap, weight[:, k])
    assert y is not None
    y = y if bias is None else y + bias
    y = F.silu(y) if activation == "silu" else y
    if docs is not None and docs.padded:
        y = torch.where(docs.tokens[:, :, None], y, 0)
    last = _last_inputs(line, owner, docs, back) if want_state else None
    return y.to(x.dtype), last


def _line_up(before: Tensor, x: Tensor, docs: Documents) -> tuple[Tensor, Tensor]:
    """The state followed by the row, [B, W-1+T, C], and the segment that owns each position.

    Only padding can lie before a row's first document, so the state is moved over it, right up to where
    the document starts.
    """
    B, back, C = before.shape
    first = docs.first_segment()[:, None]
    line = torch.cat([torch.zeros_like(before), x], 1)
    owner = torch.cat([docs.segments.new_full((B, back), -1), docs.segments], 1)
    if x.shape[1] == 0:
        return before, first.expand(B, back)
    start = (docs.segments == first).int().argmax(1, keepdim=True)
    where = start + torch.arange(back, device=x.device)
    line = line.scatter(1, where[:, :, None].expand(B, back, C), before)
    return line, owner.scatter(1, where, first.expand(B, back))


def _last_inputs(line: Tensor, owner: Tensor | None, docs: Documents | None, back: int) -> Tensor:
    """[B, C, W-1]: the last inputs of each row's last document, zeros before its start."""
    T = line.shape[1] - back
    if docs is None or owner is None or T == 0:
        return line[:, T:].transpose(1, 2).contiguous(memory_format=torch.contiguous_format).clone()
    last = docs.last_segment()[:, None]
    mine = docs.segments == last
    end = torch.where(mine.any(1), T - mine.flip(1).int().argmax(1), 0)
    where = end[:, None] + torch.arange(back, device=line.device)
    kept = line.gather(1, where[:, :, None].expand(-1, -1, line.shape[2]))
    own = owner.gather(1, where) == last
    return torch.where(own[:, :, None], kept, 0).transpose(1, 2).contiguous()
