"""Causal depthwise convolution, tap by tap and token by token: what every faster form must equal.

Shape legend: B batch  T time  C channels  W width of the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.documents import Documents


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and the last W-1 inputs [B, C, W-1]; arguments as in `causal_conv`."""
    B, T, C = x.shape
    W = weight.shape[1]
    outputs, lasts = [], []
    for row in range(B):
        segments = torch.zeros(T).long() if docs is None else docs.segments[row]
        empty = x.new_zeros(C, W - 1)
        window, owner = empty if state is None else state[row].to(x.dtype), None
        y = []
        for t in range(T):
            if segments[t] < 0:
                y.append(x.new_zeros(C))
                continue
            if owner is not None and segments[t] != owner:
                window = empty
            owner = segments[t]
            window = torch.cat([window, x[row, t, :, None]], 1)
            z = (window * weight).sum(1)
            z = z if bias is None else z + bias
            y.append(F.silu(z) if activation == "silu" else z)
            window = window[:, 1:]
        outputs.append(torch.stack(y) if y else x[row])
        lasts.append(window)
    return torch.stack(outputs).to(x.dtype), torch.stack(lasts).clone()
