"""Causal depthwise convolution as a sum of W shifted copies: nothing to lay out anew, all of it fusible.

Shape legend: B batch  T time  C channels  W width of the kernel.

Under `torch.compile` this is as fast as `F.conv1d`, which knows no documents; in eager mode that one is 1.4
times as fast (`python -m experiments.bench ssd`). A tap is masked where it would cross a document start or
read padding.
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
    T, back = x.shape[1], weight.shape[1] - 1
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    line, owner = _before(x, state, back), None
    if docs is not None:
        line, owner = _line_up(line, back, docs)
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


def _before(x: Tensor, state: Tensor | None, back: int) -> Tensor:
    """The state, or zeros, followed by the row: [B, W-1+T, C]."""
    if state is None:
        return F.pad(x, (0, 0, back, 0))
    return torch.cat([state.to(x.dtype).transpose(1, 2), x], 1)


def _line_up(line: Tensor, back: int, docs: Documents) -> tuple[Tensor, Tensor]:
    """The line with the state moved to where the first document starts, and each position's segment.

    Only padding can lie before that start, so nothing is lost under the state.
    """
    B, length, C = line.shape
    first = docs.first_segment()[:, None]
    if length == back:
        return line, first.expand(B, back)
    start = (docs.segments == first).int().argmax(1, keepdim=True)
    where = start + torch.arange(back, device=line.device)
    moved = line.scatter(1, where[:, :, None].expand(B, back, C), line[:, :back])
    owner = F.pad(docs.segments, (back, 0), value=-1)
    return moved, owner.scatter(1, where, first.expand(B, back))


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
