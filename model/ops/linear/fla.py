"""Adapters of flash-linear-attention's kernels for GPUs: layouts, documents and states, nothing else.

Shape legend: B batch  T time  H heads  K key width  V value width

Written against fla 0.6 and checked against its kernels in Triton's interpreter (`make oracles`); not
run on a GPU here. All kernels are called with a state layout of [K, V], their functional default.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.ops.documents import Documents
from model.ops.runs import call_with_runs
from model.ops.select import Reason, needs_cuda

MOST_KEYS = 256  # channels of a key in the delta rules' chunk kernels


def refusal(x: Tensor, **features: Any) -> Reason:
    """Why the kernels cannot serve, or None."""
    return "an empty input has nothing to launch" if x.numel() == 0 else needs_cuda(x, **features)


def gated_delta_refusal(x: Tensor, *, width: int = 1, **features: Any) -> Reason:
    """As `refusal`, for keys of `width` channels: the kernels hold a state's whole columns."""
    if width > MOST_KEYS:
        return f"its kernels take keys of up to {MOST_KEYS} channels, got {width}"
    return refusal(x, **features)


def delta_refusal(x: Tensor, **features: Any) -> Reason:
    """As `gated_delta_refusal`; the kernel of the ungated delta rule has no fp32."""
    if x.dtype == torch.float32:
        return "its kernel needs fp16 or bf16, got torch.float32"
    return gated_delta_refusal(x, **features)


def _kernel(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)


def gla_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gla`; one token is served by the recurrent kernel."""
    if q.shape[1] == 1:
        kernel = _kernel("gla", "fused_recurrent_gla")
        return _run(lambda q, k, v, g, **kw: kernel(q, k, v, gk=g, **kw), (q, k, v, g), scale, state, docs)
    return _run(_kernel("gla", "chunk_gla"), (q, k, v, g), scale, state, docs)


def rwkv6_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    u: Tensor,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
    floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rwkv6`; one token is served by the recurrent kernel."""
    kernel = _kernel("rwkv6", "fused_recurrent_rwkv6" if q.shape[1] == 1 else "chunk_rwkv6")
    return _run(lambda *args, **kw: kernel(*args, u, **kw), (q, k, v, g), scale, state, docs)


def delta_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    beta: Tensor,
    scale: float,
    state: Tensor | None = None,
    docs: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, with the kernel of the plain, the gated or the per-channel gated rule."""
    one = q.shape[1] == 1
    if g is None:
        name = "fused_recurrent_delta_rule" if one else "chunk_delta_rule"
        return _run(_kernel("delta_rule", name), (q, k, v, beta), scale, state, docs)
    # The gated recurrent kernels have no gradient: one raises, the other returns what knows of none.
    given = (q, k, v, g, beta, *(() if state is None else (state,)))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    prefix = "fused_recurrent" if one and not trained else "chunk"
    name = "kda" if g.dim() == 4 else "gated_delta_rule"
    kernel = _kernel(name, f"{prefix}_{name}")
    call = lambda q, k, v, g, beta, **kw: kernel(q, k, v, g=g, beta=beta, **kw)  # noqa: E731
    return _run(call, (q, k, v, g, beta), scale, state, docs)


def _run(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    scale: float,
    state: Tensor | None,
    docs: Documents | None,
) -> tuple[Tensor, Tensor]:
    """Call with inputs (q, k, v, gates...): q, k and v share v's dtype, gates and state are fp32."""
    dtype = inputs[2].dtype
    inputs = tuple(x.to(dtype) if i < 3 else x.float() for i, x in enumerate(inputs))
    state = None if state is None else state.float()
    o, last = call_with_runs(kernel, inputs, state, docs, scale=scale)
    assert last is not None
    return o.to(dtype), last
