"""Adapter of flash-linear-attention's scalar-gate kernel for the state-space dual on GPUs.

Shape legend: B batch  T time  H heads  P head width  G groups  N state width

`chunk_simple_gla` with q = c, k = b, v = x, g = log_a and scale 1 is this operator. Written against fla 0.6
and checked against its kernel in Triton's interpreter (`make oracles`); not run on a GPU here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model.ops.documents import Documents
from model.ops.runs import call_with_runs
from model.ops.select import Reason, needs_cuda


def refusal(x: Tensor, **features: Any) -> Reason:
    """Why the kernel cannot serve, or None."""
    return "an empty input has nothing to launch" if x.numel() == 0 else needs_cuda(x, **features)


def ssd_fla(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    docs: Documents | None = None,
    want_state: bool = True,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, P] and the state [B, H, N, P] after the last token; arguments as in `ssd`."""
    from fla.ops.simple_gla import chunk_simple_gla

    R = x.shape[2] // b.shape[2]
    b, c = (t.to(x.dtype).repeat_interleave(R, dim=2) for t in (b, c))
    y, last = call_with_runs(chunk_simple_gla, (c, b, x, log_a.float()), state, docs, want_state, scale=1.0)
    return y.to(x.dtype), last
