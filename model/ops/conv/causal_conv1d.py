"""Adapter of the causal-conv1d CUDA kernel, imported when first used.

Shape legend: B batch  T time  C channels  W width of the kernel.

The kernel resets at documents (`seq_idx`) or carries a state, not both at once, and carries one only for
channel-last memory, which is what we have. Written against causal-conv1d 1.7; its bookkeeping is tested
against a stand-in kernel, the kernel itself has not been run on a GPU here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.ops.documents import Documents
from model.ops.select import Reason, needs_cuda


def refusal(x: Tensor, *, width: int, stateful: bool, docs: Documents | None, **_: Any) -> Reason:
    """Why the kernel cannot serve, or None."""
    if not 2 <= width <= 4:
        return f"its kernels are 2 to 4 wide, not {width}"
    if docs is not None and stateful:
        return "it cannot carry a state across packed or padded documents"
    if x.numel() == 0:
        return "an empty input has nothing to launch"
    if x.shape[2] % 8:
        return f"needs a multiple of 8 channels, got {x.shape[2]}"
    return needs_cuda(x)


def conv_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, C] and the last W-1 inputs [B, C, W-1]; arguments as in `causal_conv`."""
    from causal_conv1d import causal_conv1d_fn

    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.contiguous()
    if docs is not None and docs.padded:
        rows = torch.where(docs.tokens[:, :, None], rows, 0)
    channels = rows.transpose(1, 2)  # [B, C, T] with channels adjacent in memory
    if docs is not None:
        y = causal_conv1d_fn(
            channels, weight, bias, seq_idx=docs.segments.int().contiguous(), activation=activation
        ).transpose(1, 2)
        return (torch.where(docs.tokens[:, :, None], y, 0) if docs.padded else y), None
    if not want_state and state is None:
        return causal_conv1d_fn(channels, weight, bias, activation=activation).transpose(1, 2), None
    B, _, C = x.shape
    before = x.new_zeros(B, weight.shape[1] - 1, C) if state is None else state.to(x.dtype).transpose(1, 2)
    y, last = causal_conv1d_fn(
        channels,
        weight,
        bias,
        initial_states=before.contiguous().transpose(1, 2),
        return_final_states=True,
        activation=activation,
    )
    return y.transpose(1, 2), last.contiguous()
