"""Causal depthwise convolution over time with optional SiLU: one interface, several implementations.

Shape legend: B batch  T time  C channels  W width of the kernel.
"""

from __future__ import annotations

from torch import Tensor

from model.ops.conv import causal_conv1d
from model.ops.conv.cpu import conv_shifts
from model.ops.conv.reference import conv_reference
from model.ops.documents import Documents
from model.ops.select import Backend, choose, package, register

__all__ = ["causal_conv"]

register(
    "conv",
    Backend(
        "causal_conv1d",
        causal_conv1d.conv_cuda,
        supports=causal_conv1d.refusal,
        available=package("causal_conv1d"),
    ),
    Backend("shifts", conv_shifts),
    Backend("reference", conv_reference),
)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_k weight_k x_{t-W+1+k}), every channel by itself.

    x:      [B, T, C].
    weight: [C, W], the newest tap last; bias: [C].
    activation: None or `silu`.
    state:  [B, C, W-1], the inputs before the row's first document continues; None is zeros.
    docs:   taps never cross a document start nor read padding, whose output is zero.

    Returns y [B, T, C], and when wanted the last W-1 inputs [B, C, W-1] of each row's last document
    (zeros before its start), else None. Every tensor argument has a gradient.

    backend: `auto`, `causal_conv1d` (CUDA), `shifts` (torch, any device) or `reference`.
    Raises BackendError when the named backend cannot serve, ValueError on shapes that do not fit.
    """
    B, _, C = x.shape
    W = weight.shape[1]
    if weight.shape[0] != C or (bias is not None and bias.shape != (C,)):
        raise ValueError(f"causal_conv: weight {tuple(weight.shape)} and bias do not fit {C} channels")
    if state is not None and tuple(state.shape) != (B, C, W - 1):
        raise ValueError(f"causal_conv: state must be {(B, C, W - 1)}, got {tuple(state.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv: activation must be None or 'silu', got {activation!r}")
    stateful = want_state or state is not None
    chosen = choose("conv", backend, x, width=W, stateful=stateful, docs=docs)
    y, last = chosen.fn(x, weight, bias, activation, state=state, docs=docs, want_state=want_state)
    return y, (last if want_state else None)
